"""Owns the mirrors of what all kernels across nodes are passed: `network.cuh`, `gin_relay.cuh` and `exchange.cuh`."""

from __future__ import annotations

import enum
import functools

from deep_ep_core.jit import KernelSpec, LaunchShape, package_include_dir
from deep_ep_core.jit.structs import Bool, Int32, ParamsStruct, Pointer, UInt64, opaque
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.wait import WaitParams
from deep_ep_ep.device.opening import Opening

__all__ = [
    "INCLUDE_DIRS",
    "OPENING_BYTES",
    "DrainParams",
    "ExchangeParams",
    "Network",
    "NetworkWord",
    "drain_launch_shape",
    "drain_spec",
    "exchange_launch_shape",
    "exchange_spec",
    "gin_call_type",
]

INCLUDE_DIRS = (package_include_dir("deep_ep_ep"), package_include_dir("deep_ep_core"))
"""Where the headers of the kernels are."""

OPENING_BYTES = 64
"""Bytes of an `Opening`; the counts of a slot are behind them."""

_EXCHANGE_THREADS = 512
_DRAIN_THREADS = 128


class NetworkWord(enum.IntEnum):
    """Words that ranks raise in each other's windows; mirror of the enum in `network.cuh`."""

    OPENING = 0
    OPENED = 1
    ROWS = 2
    RETURNED = 3
    ARRIVED = 4
    READ = 5


class Network(ParamsStruct):
    """Who reaches whom, and where control memory lies; mirror of the struct in `network.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::Network"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("state", Pointer),
        ("totals", Pointer),
        ("num_puts", Pointer),
        ("slots_offset", UInt64),
        ("slot_bytes", UInt64),
        ("words_offset", UInt64),
        ("num_ranks", Int32),
        ("num_contexts", Int32),
        ("is_hybrid", Bool),
    )


class ExchangeParams(ParamsStruct):
    """What the exchange of openings is passed; mirror of the struct in `exchange.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::ExchangeParams"
    _fields_ = (("net", Network), ("opening", Opening), ("num_counts", Int32))


class DrainParams(ParamsStruct):
    """What the kernel is passed that waits for the network; mirror of the struct in `drain.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::DrainParams"
    _fields_ = (("net", Network), ("num_contexts", Int32))


@functools.lru_cache(maxsize=8)
def _gin_access_type(dev_comm_bytes: int) -> type[ParamsStruct]:
    class GinAccess(ParamsStruct):
        __slots__ = ()
        cuda_name = "deep_ep_ep::GinAccess"
        _fields_ = (("dev_comm", opaque(dev_comm_bytes)), ("window", Pointer))

    return GinAccess


@functools.lru_cache(maxsize=32)
def gin_call_type(call_type: type[ParamsStruct], cuda_name: str, dev_comm_bytes: int) -> type[ParamsStruct]:
    """The mirror of a struct of two members: `gin`, what a kernel needs for GIN, and `call`, the rest.

    Args:
        call_type: Mirror of the second.
        cuda_name: Name of the struct.
        dev_comm_bytes: `sizeof(ncclDevComm)` of the NCCL that runs.
    """
    name = cuda_name

    class Call(ParamsStruct):
        __slots__ = ()
        cuda_name = name
        _fields_ = (("gin", _gin_access_type(dev_comm_bytes)), ("call", call_type))

    return Call


def exchange_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel by which ranks open an operation.

    Args:
        dev_comm_bytes: `sizeof(ncclDevComm)` of the NCCL that runs.
    """
    return KernelSpec(
        label="network_exchange",
        header="deep_ep_ep/network/exchange.cuh",
        function="deep_ep_ep::exchange",
        params_type=gin_call_type(ExchangeParams, "deep_ep_ep::ExchangeCall", dev_comm_bytes),
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=_EXCHANGE_THREADS,
        needs_nccl=True,
    )


def exchange_launch_shape() -> LaunchShape:
    """One block: what it moves is small."""
    return LaunchShape(grid=(1, 1, 1), block=(_EXCHANGE_THREADS, 1, 1))


def drain_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel that waits until the network has read what this rank has put.

    Args:
        dev_comm_bytes: `sizeof(ncclDevComm)` of the NCCL that runs.
    """
    return KernelSpec(
        label="network_drain",
        header="deep_ep_ep/network/drain.cuh",
        function="deep_ep_ep::drain",
        params_type=gin_call_type(DrainParams, "deep_ep_ep::DrainCall", dev_comm_bytes),
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=_DRAIN_THREADS,
        needs_nccl=True,
    )


def drain_launch_shape() -> LaunchShape:
    """One block."""
    return LaunchShape(grid=(1, 1, 1), block=(_DRAIN_THREADS, 1, 1))
