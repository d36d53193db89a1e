"""Owns the dispatch kernel as the host sees it: the mirrors of `dispatch_params.cuh`, its spec and its launch shape."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.jit import KernelSpec, LaunchShape, package_include_dir
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, Int64, ParamsStruct, Pointer, UInt64
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.wait import WaitParams
from deep_ep_ep.device.opening import Opening

__all__ = [
    "DispatchConfig",
    "DispatchParams",
    "RowStages",
    "all_dispatch_configs",
    "dispatch_launch_shape",
    "dispatch_spec",
    "row_stages",
    "side_bytes",
]

_NUM_THREADS = 512
_NUM_WARPS = _NUM_THREADS // 32
# `kNumSideWarps`: these move no rows.
_NUM_ROW_WARPS = _NUM_WARPS - 2
_STAGE_ALIGNMENT = 128
# What a block may have on sm_90 and sm_100 is 227 KiB; the kernel's own static part is below 6 KiB.
_MAX_SMEM_BYTES = 220 * 1024
_MAX_PLAN_BESIDE_BYTES = 64 * 1024
# Longer rows travel in pieces, so that each SM has several on the move.
_MAX_PIECE_BYTES = 16 * 1024
_SIDE_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchConfig(ConfigStruct):
    """What the kernel is specialised by; mirror of the struct in `dispatch_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_ep::DispatchConfig"
    has_plan: bool
    has_place: bool
    has_receive: bool
    is_idx64: bool


class DispatchParams(ParamsStruct):
    """What the kernel is passed; mirror of the struct in `dispatch_params.cuh`, which says what each field is."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::DispatchParams"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("state", Pointer),
        ("opening_offset", UInt64),
        ("counts_offset", UInt64),
        ("arrivals_offset", UInt64),
        ("opening", Opening),
        ("x", Pointer),
        ("sf", Pointer),
        ("topk_idx", Pointer),
        ("topk_weights", Pointer),
        ("sf_token_stride", Int64),
        ("sf_pack_stride", Int64),
        ("block_counts", Pointer),
        ("row_of_entry", Pointer),
        ("expert_row_of_entry", Pointer),
        ("num_send_rows", Pointer),
        ("recv_row_ends", Pointer),
        ("dst_slot", Pointer),
        ("topk_idx_copy", Pointer),
        ("expert_ends", Pointer),
        ("num_expert_rows", Pointer),
        ("recv_stats", Pointer),
        ("host_counts", Pointer),
        ("metadata", Pointer),
        ("recv_x", Pointer),
        ("recv_sf", Pointer),
        ("recv_topk_idx", Pointer),
        ("recv_topk_weights", Pointer),
        ("recv_sf_row_stride", Int64),
        ("recv_sf_pack_stride", Int64),
        ("host_stamp", Int32),
        ("counts_capacity", Int32),
        ("num_ranks", Int32),
        ("num_tokens", Int32),
        ("num_topk", Int32),
        ("num_experts", Int32),
        ("num_max_tokens", Int32),
        ("expert_alignment", Int32),
        ("row_bytes", Int32),
        ("num_sf_packs", Int32),
        ("side_bytes", Int32),
        ("num_stages", Int32),
        ("piece_bytes", Int32),
        ("stages_offset", Int32),
        ("do_expand", Bool),
        ("is_staged", Bool),
        ("do_zero_padding", Bool),
        ("fans_out_at_sender", Bool),
    )


def dispatch_spec(config: DispatchConfig) -> KernelSpec:
    """The kernel of a configuration."""
    parts = {"plan": config.has_plan, "place": config.has_place, "receive": config.has_receive}
    return KernelSpec(
        label="_".join(["dispatch", *(name for name, is_part in parts.items() if is_part)]),
        header="deep_ep_ep/dispatch_kernel.cuh",
        function="deep_ep_ep::run_dispatch",
        params_type=DispatchParams,
        include_dirs=(package_include_dir("deep_ep_ep"), package_include_dir("deep_ep_core")),
        max_threads_per_block=_NUM_THREADS,
        config=config,
    )


def side_bytes(*, num_topk: int, num_sf_packs: int, has_weights: bool, do_expand: bool) -> int:
    """Bytes of a token's side record: packs, weights, ids, rows by expert, and its index; see `side_layout`."""
    words = num_sf_packs + num_topk * (1 + has_weights + do_expand) + 1
    return align_up(4 * words, _SIDE_ALIGNMENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowStages:
    """How rows travel through shared memory.

    Attributes:
        num_stages: Warps that move rows, each with a stage.
        piece_bytes: Bytes of a row that a stage holds.
        offset: Where the stages begin; 0 is where the plan was, if there is one, and then no row is loaded ahead of it.
        smem_bytes: Shared memory of a block, the plan's included.
    """

    num_stages: int
    piece_bytes: int
    offset: int
    smem_bytes: int


@functools.lru_cache(maxsize=256)
def row_stages(row_bytes: int, *, plan_columns: int) -> RowStages:
    """The stages for rows of a size.

    Args:
        row_bytes: Bytes of a row, a multiple of 16.
        plan_columns: Ranks and experts, in a kernel that plans; 0 in one that does not.
    """
    # See `plan_memory`: masks, four words a column, and prefix sums of two bytes.
    plan_bytes = align_up(plan_columns * (_NUM_WARPS * (4 + 2) + 4 * 4), _STAGE_ALIGNMENT)
    num_pieces = ceil_div(row_bytes, _MAX_PIECE_BYTES)
    piece_bytes = align_up(ceil_div(row_bytes, num_pieces), 16)
    stage_bytes = align_up(piece_bytes, _STAGE_ALIGNMENT)
    # Beside a large plan there is room for few stages: then they take its place, once it is made.
    offset = plan_bytes if plan_bytes <= _MAX_PLAN_BESIDE_BYTES else 0
    num_stages = min(_NUM_ROW_WARPS, (_MAX_SMEM_BYTES - offset) // stage_bytes)
    return RowStages(
        num_stages=num_stages,
        piece_bytes=piece_bytes,
        offset=offset,
        smem_bytes=max(plan_bytes, offset + num_stages * stage_bytes),
    )


def all_dispatch_configs() -> list[DispatchConfig]:
    """Every variant that is launched."""
    parts = (
        (True, False, False),
        (True, True, False),
        (True, True, True),
        (False, True, True),
        (False, False, True),
    )
    return [
        DispatchConfig(has_plan=has_plan, has_place=has_place, has_receive=has_receive, is_idx64=is_idx64)
        for has_plan, has_place, has_receive in parts
        for is_idx64 in (True, False)
    ]


def dispatch_launch_shape(*, num_sms: int, stages: RowStages) -> LaunchShape:
    """One block an SM.

    Args:
        num_sms: Number of blocks.
        stages: Stages of the rows.
    """
    return LaunchShape(grid=(num_sms, 1, 1), block=(_NUM_THREADS, 1, 1), smem_bytes=stages.smem_bytes)
