"""The kernels of these tests: mirrors of include/device_tests/*.cuh and their specs."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from deep_ep_core.barrier import lsa_barrier_spec
from deep_ep_core.jit import (
    ConfigStruct,
    Int32,
    KernelSpec,
    ParamsStruct,
    Pointer,
    UInt32,
    UInt64,
    package_include_dir,
)
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.wait import WaitParams

CORE_INCLUDE_DIR = package_include_dir("deep_ep_core")
TEST_INCLUDE_DIR = Path(__file__).parent / "include"
MAX_THREADS = 256
NUM_COPY_STAGES = 3


class CopyWordsParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::CopyWordsParams"
    _fields_ = (
        ("x32", Pointer),
        ("y32", Pointer),
        ("x64", Pointer),
        ("y64", Pointer),
        ("x128", Pointer),
        ("y128", Pointer),
        ("num_words", Int32),
    )


class CountParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::CountParams"
    _fields_ = (
        ("sums32", Pointer),
        ("sums64", Pointer),
        ("counters32", Pointer),
        ("counters64", Pointer),
        ("tickets32", Pointer),
        ("tickets64", Pointer),
        ("claims32", Pointer),
        ("claims64", Pointer),
        ("num_winners", Pointer),
        ("values", Pointer),
        ("num_blocks_done", Pointer),
        ("total", Pointer),
    )


class InspectParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::InspectParams"
    _fields_ = (
        ("lanes", Pointer),
        ("is_elected", Pointer),
        ("elapsed_ns", Pointer),
        ("elapsed_cycles", Pointer),
        ("delay_ns", UInt64),
    )


class ChainParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::ChainParams"
    _fields_ = (("values", Pointer), ("delay_ns", UInt64))


class MeetPairsParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::MeetPairsParams"
    _fields_ = (("num_wrong", Pointer), ("num_rounds", Int32))


class CacheHint(enum.IntEnum):
    NONE = 0
    EVICT_FIRST = 1
    EVICT_NORMAL = 2
    EVICT_LAST = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyBytesConfig(ConfigStruct):
    cuda_name: ClassVar[str] = "device_tests::CopyBytesConfig"
    hint: CacheHint
    is_inverted: bool


class CopyBytesParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::CopyBytesParams"
    _fields_ = (
        ("wait", WaitParams),
        ("x", Pointer),
        ("y", Pointer),
        ("num_chunks", Int32),
        ("chunk_bytes", UInt32),
        ("stage_bytes", UInt32),
        ("smem_offset", UInt32),
        ("num_failures", Pointer),
    )


# Each cache hint, and both ways through shared memory: with plain accesses in between, and without.
COPY_VARIANTS = (
    (CacheHint.NONE, True),
    (CacheHint.EVICT_FIRST, True),
    (CacheHint.EVICT_NORMAL, False),
    (CacheHint.EVICT_LAST, False),
)


class Scope(enum.IntEnum):
    GPU = 0
    SYS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PingPongConfig(ConfigStruct):
    cuda_name: ClassVar[str] = "device_tests::PingPongConfig"
    scope: Scope
    is_counted: bool


class PingPongParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::PingPongParams"
    _fields_ = (
        ("wait", WaitParams),
        ("flags", Pointer),
        ("payloads", Pointer),
        ("first_round", UInt64),
        ("num_rounds", Int32),
        ("num_words", Int32),
        ("num_wrong", Pointer),
        ("num_late", Pointer),
    )


class TalkParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::TalkParams"
    _fields_ = (
        ("wait", WaitParams),
        ("slots", Pointer),
        ("epochs", Pointer),
        ("num_epochs", Int32),
        ("num_wrong", Pointer),
        ("num_late", Pointer),
    )


class VouchParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::VouchParams"
    _fields_ = (
        ("wait", WaitParams),
        ("slots", Pointer),
        ("words", Pointer),
        ("epochs", Pointer),
        ("num_epochs", Int32),
        ("num_words", Int32),
        ("num_wrong", Pointer),
        ("num_late", Pointer),
    )


class WaitKind(enum.IntEnum):
    FLAG = 0
    MESSAGE = 1
    MBARRIER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpireConfig(ConfigStruct):
    cuda_name: ClassVar[str] = "device_tests::ExpireConfig"
    kind: WaitKind


class ExpireParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::ExpireParams"
    _fields_ = (
        ("wait", WaitParams),
        ("flags", Pointer),
        ("slots", Pointer),
        ("num_arrived", Pointer),
        ("num_late", Pointer),
    )


class Transfer(enum.IntEnum):
    STORE = 0
    BULK_STORE = 1
    BULK_LOAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeConfig(ConfigStruct):
    cuda_name: ClassVar[str] = "device_tests::ExchangeConfig"
    transfer: Transfer


class ExchangeParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::ExchangeParams"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("slots_offset", UInt64),
        ("words_offset", UInt64),
        ("first_round", UInt64),
        ("num_rounds", Int32),
        ("num_words", Int32),
        ("num_wrong", Pointer),
        ("num_late", Pointer),
    )


class TimeBarrierParams(ParamsStruct):
    __slots__ = ()
    cuda_name = "device_tests::TimeBarrierParams"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("slot_offset", UInt64),
        ("num_rounds", Int32),
        ("elapsed_ns", Pointer),
    )


def _spec(
    function: str, header: str, params_type: type[ParamsStruct], config: ConfigStruct | None = None
) -> KernelSpec:
    return KernelSpec(
        label=function,
        header=f"device_tests/{header}.cuh",
        function=f"device_tests::{function}",
        params_type=params_type,
        include_dirs=(CORE_INCLUDE_DIR, TEST_INCLUDE_DIR),
        max_threads_per_block=MAX_THREADS,
        config=config,
    )


def meet_pairs_spec() -> KernelSpec:
    return _spec("meet_pairs", "words", MeetPairsParams)


def copy_words_spec() -> KernelSpec:
    return _spec("copy_words", "words", CopyWordsParams)


def count_spec() -> KernelSpec:
    return _spec("count", "words", CountParams)


def inspect_spec() -> KernelSpec:
    return _spec("inspect", "words", InspectParams)


def chain_spec() -> KernelSpec:
    return _spec("chain", "words", ChainParams)


def copy_bytes_spec(*, hint: CacheHint, is_inverted: bool) -> KernelSpec:
    return _spec("copy_bytes", "copies", CopyBytesParams, CopyBytesConfig(hint=hint, is_inverted=is_inverted))


def ping_pong_spec(*, scope: Scope, is_counted: bool) -> KernelSpec:
    return _spec("ping_pong", "signals", PingPongParams, PingPongConfig(scope=scope, is_counted=is_counted))


def talk_spec() -> KernelSpec:
    return _spec("talk", "signals", TalkParams)


def vouch_spec() -> KernelSpec:
    return _spec("vouch", "signals", VouchParams)


def expire_spec(kind: WaitKind) -> KernelSpec:
    return _spec("expire", "signals", ExpireParams, ExpireConfig(kind=kind))


def exchange_spec(transfer: Transfer) -> KernelSpec:
    return _spec("exchange", "exchange", ExchangeParams, ExchangeConfig(transfer=transfer))


def time_barrier_spec() -> KernelSpec:
    return _spec("time_barrier", "exchange", TimeBarrierParams)


def all_specs() -> list[KernelSpec]:
    """Every kernel, as `python -m deep_ep_core.jit precompile device_kernels:all_specs` takes them."""
    return [
        copy_words_spec(),
        count_spec(),
        inspect_spec(),
        chain_spec(),
        meet_pairs_spec(),
        *(copy_bytes_spec(hint=hint, is_inverted=is_inverted) for hint, is_inverted in COPY_VARIANTS),
        *(ping_pong_spec(scope=scope, is_counted=is_counted) for scope in Scope for is_counted in (False, True)),
        talk_spec(),
        vouch_spec(),
        *(expire_spec(kind) for kind in WaitKind),
        *(exchange_spec(transfer) for transfer in Transfer),
        time_barrier_spec(),
        lsa_barrier_spec(),
    ]
