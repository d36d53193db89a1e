"""Owns the kernels of the normal calls as the host sees them: mirrors of their structs, specs, and sizes of the stage.

What the parameters are filled with is not known here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch

from deep_ep_core.align import align_up
from deep_ep_core.jit import KernelSpec, LaunchShape, package_include_dir
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, Int64, ParamsStruct, Pointer, UInt32, UInt64
from deep_ep_core.lsa_team import MAX_LSA_RANKS, LsaTeam
from deep_ep_core.wait import WaitParams

__all__ = [
    "FLAGS_BYTES",
    "MAX_LOCAL_EXPERTS",
    "NUM_AGREED",
    "OPENING_SLOTS_BYTES",
    "RANK_STATE_BYTES",
    "CombineParams",
    "DispatchConfig",
    "DispatchParams",
    "Flags",
    "LayoutParams",
    "Opening",
    "Places",
    "RankState",
    "all_specs",
    "combine_slots",
    "combine_spec",
    "counts_bytes",
    "dispatch_slots",
    "launch_shape",
    "layout_spec",
    "plan_spec",
    "pull_spec",
    "side_bytes",
]

_NUM_THREADS = 512
_MESSAGE_BYTES = 16
_WORD_BYTES = 4
_MAX_BIASES = 2
# `DispatchStage::kHeadBytes`.
_HEAD_BYTES = 512
# Tokens are counted in integers of 32 bits.
_MAX_SLOTS = 2**30

NUM_AGREED = 10
"""Values of 32 bits on which ranks must agree, `kNumAgreed`; the device fills in the last one."""

MAX_LOCAL_EXPERTS = 1024
"""The most experts of one rank: `kMaxLocalExperts`."""

OPENING_SLOTS_BYTES = 2 * MAX_LSA_RANKS * (NUM_AGREED // 2 + 1) * _MESSAGE_BYTES
"""Bytes of the window for the openings of all ranks: `OpeningSlots`."""


class RankState(ParamsStruct):
    """Device memory of a rank, all zero at first; mirror of the struct in `rank_state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::RankState"
    _fields_ = (
        ("epoch", UInt64),
        ("round", UInt64),
        ("num_tokens", Int32 * MAX_LSA_RANKS),
        ("num_staged", UInt32),
        ("num_pulled", UInt32),
        ("num_exited", UInt32),
        ("has_opened", UInt32),
    )


class Flags(ParamsStruct):
    """Words that peers write, in the window; mirror of the struct in `rank_state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::Flags"
    _fields_ = (("staged", UInt64 * MAX_LSA_RANKS), ("pulled", UInt64 * MAX_LSA_RANKS))


RANK_STATE_BYTES = ctypes.sizeof(RankState)
FLAGS_BYTES = ctypes.sizeof(Flags)


class Places(ParamsStruct):
    """Where state and window are, as part of the kernels' parameters; mirror of the struct in `rank_state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::Places"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("state", Pointer),
        ("opening_offset", UInt64),
        ("counts_offset", UInt64),
        ("flags_offset", UInt64),
        ("stage_offset", UInt64),
    )


class Opening(ParamsStruct):
    """What a rank opens an operation with; mirror of the struct in `opening.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::Opening"
    _fields_ = (("agreed", UInt32 * NUM_AGREED), ("num_tokens", UInt32), ("num_worst_tokens", UInt32))


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig(ConfigStruct):
    """What kernels that read `topk_idx` are specialised by; mirror of the struct in `dispatch_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_legacy::normal::DispatchConfig"
    is_idx64: bool


class DispatchParams(ParamsStruct):
    """What both kernels of a dispatch are passed; mirror of the struct in `dispatch_params.cuh`, which says more."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::DispatchParams"
    _fields_ = (
        ("places", Places),
        ("opening", Opening),
        ("x", Pointer),
        ("sf", Pointer),
        ("topk_idx", Pointer),
        ("topk_weights", Pointer),
        ("is_token_in_rank", Pointer),
        ("num_tokens_per_rank", Pointer),
        ("num_tokens_per_expert", Pointer),
        ("sf_token_stride", Int64),
        ("sf_pack_stride", Int64),
        ("rank_prefix_matrix", Pointer),
        ("channel_prefix_matrix", Pointer),
        ("recv_channel_prefix_matrix", Pointer),
        ("recv_src_idx", Pointer),
        ("send_head", Pointer),
        ("host_counts", Pointer),
        ("recv_x", Pointer),
        ("recv_sf", Pointer),
        ("recv_topk_idx", Pointer),
        ("recv_topk_weights", Pointer),
        ("host_stamp", Int32),
        ("num_tokens", Int32),
        ("num_topk", Int32),
        ("num_experts", Int32),
        ("num_channels", Int32),
        ("expert_alignment", Int32),
        ("num_recv", Int32),
        ("row_bytes", Int32),
        ("num_sf_packs", Int32),
        ("side_bytes", Int32),
        ("num_slots", Int32),
        ("repeats", Bool),
    )


class CombineParams(ParamsStruct):
    """What the combine kernel is passed; mirror of the struct in `combine_kernel.cuh`, which says more."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::CombineParams"
    _fields_ = (
        ("places", Places),
        ("opening", Opening),
        ("x", Pointer),
        ("topk_weights", Pointer),
        ("biases", Pointer * _MAX_BIASES),
        ("is_token_in_rank", Pointer),
        ("rank_prefix_matrix", Pointer),
        ("recv_src_idx", Pointer),
        ("out", Pointer),
        ("out_weights", Pointer),
        ("num_tokens", Int32),
        ("num_recv", Int32),
        ("num_topk", Int32),
        ("row_bytes", Int32),
        ("num_slots", Int32),
    )


class LayoutParams(ParamsStruct):
    """What the layout kernel is passed; mirror of the struct in `layout_kernel.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::normal::LayoutParams"
    _fields_ = (
        ("topk_idx", Pointer),
        ("num_tokens_per_rank", Pointer),
        ("num_tokens_per_expert", Pointer),
        ("is_token_in_rank", Pointer),
        ("num_tokens", Int32),
        ("num_topk", Int32),
        ("num_experts", Int32),
        ("num_ranks", Int32),
    )


def _spec(
    label: str, header: str, function: str, params_type: type[ParamsStruct], idx_dtype: torch.dtype | None = None
) -> KernelSpec:
    return KernelSpec(
        label=label,
        header=f"deep_ep_legacy/normal/{header}",
        function=f"deep_ep_legacy::normal::{function}",
        params_type=params_type,
        include_dirs=(package_include_dir("deep_ep_legacy"), package_include_dir("deep_ep_core")),
        max_threads_per_block=_NUM_THREADS,
        config=None if idx_dtype is None else DispatchConfig(is_idx64=idx_dtype == torch.int64),
    )


def layout_spec(idx_dtype: torch.dtype) -> KernelSpec:
    """The kernel of `get_dispatch_layout`, for `topk_idx` of int64 or int32."""
    return _spec("v1_layout", "layout_kernel.cuh", "lay_out", LayoutParams, idx_dtype)


def plan_spec(idx_dtype: torch.dtype) -> KernelSpec:
    """The first kernel of a new dispatch, for `topk_idx` of int64 or int32."""
    return _spec("v1_plan_dispatch", "plan_kernel.cuh", "plan_dispatch", DispatchParams, idx_dtype)


def pull_spec(idx_dtype: torch.dtype) -> KernelSpec:
    """The kernel that pulls the rows of a dispatch, for `topk_idx` of int64 or int32."""
    return _spec("v1_pull_dispatch", "pull_kernel.cuh", "pull_dispatch", DispatchParams, idx_dtype)


def combine_spec() -> KernelSpec:
    """The kernel of `combine`."""
    return _spec("v1_combine", "combine_kernel.cuh", "combine", CombineParams)


def all_specs(idx_dtypes: tuple[torch.dtype, ...] = (torch.int64, torch.int32)) -> tuple[KernelSpec, ...]:
    """Every variant for these dtypes of `topk_idx`."""
    by_idx = (layout_spec, plan_spec, pull_spec)
    return (*(make(idx_dtype) for make in by_idx for idx_dtype in idx_dtypes), combine_spec())


def launch_shape(num_sms: int) -> LaunchShape:
    """One block an SM. Those of all ranks wait for each other: all must be resident at once."""
    return LaunchShape(grid=(num_sms, 1, 1), block=(_NUM_THREADS, 1, 1))


def counts_bytes(num_ranks: int) -> int:
    """Bytes of the window for the counts of all ranks; `count_slots` in `plan_kernel.cuh`."""
    return 2 * num_ranks * (num_ranks + MAX_LOCAL_EXPERTS) * _MESSAGE_BYTES


def side_bytes(*, num_sf_packs: int, num_topk: int) -> int:
    """Bytes of what is staged beside a row: its scales, and an id and a weight for each entry of its routing."""
    return align_up((num_sf_packs + 2 * num_topk) * _WORD_BYTES, _MESSAGE_BYTES)


def dispatch_slots(stage_bytes: int, *, num_ranks: int, row_bytes: int, side_bytes: int) -> int:
    """Tokens of one rank that its stage has room for: `DispatchStage`. 0 where there is none for a single one."""
    return min((stage_bytes - _HEAD_BYTES) // (row_bytes + side_bytes + num_ranks * _WORD_BYTES), _MAX_SLOTS)


def combine_slots(stage_bytes: int, *, num_ranks: int, row_bytes: int, num_topk: int) -> int:
    """Tokens of each rank whose rows a stage has room for: `CombineStage`. 0 where there is none for a single one."""
    return min(stage_bytes // (num_ranks * (row_bytes + num_topk * _WORD_BYTES)), _MAX_SLOTS)
