"""Owns the Python side of the combine kernel: the mirrors of `combine_params.cuh`, its variants, and its launch shape.

What the parameters are filled with is not known here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.jit import KernelSpec, LaunchShape, package_include_dir
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, ParamsStruct, Pointer, UInt64
from deep_ep_core.lsa_team import LsaTeam
from deep_ep_core.wait import WaitParams
from deep_ep_ep.device.opening import Opening

__all__ = [
    "COMBINE_SMEM_BYTES",
    "COMBINE_THREADS",
    "CombineConfig",
    "CombineParams",
    "RowType",
    "all_combine_specs",
    "combine_launch_shape",
    "combine_slab_bytes",
    "combine_spec",
]

_MAX_BIASES = 2
_WEIGHT_BYTES = 4

# As in `RowRing` (row_ring.cuh): warps of a block, pieces of a warp's ring, bytes of a piece.
_NUM_WARPS = 8
_NUM_STAGES = 12
_PIECE_BYTES = 2048

COMBINE_THREADS = _NUM_WARPS * 32
"""Threads of a block."""

COMBINE_SMEM_BYTES = _NUM_WARPS * _NUM_STAGES * _PIECE_BYTES
"""Dynamic shared memory of a block, in bytes: the pieces of rows that it has under way."""


class RowType(enum.IntEnum):
    """The element types that are added; mirror of the enum in `row_element.cuh`."""

    BFLOAT16 = 0
    FLOAT16 = 1
    FLOAT32 = 2
    FLOAT64 = 3


_ROW_TYPES = {
    torch.bfloat16: RowType.BFLOAT16,
    torch.float16: RowType.FLOAT16,
    torch.float32: RowType.FLOAT32,
    torch.float64: RowType.FLOAT64,
}
_HAS_WIDE_IDX = {torch.int64: True, torch.int32: False}


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineConfig(ConfigStruct):
    """What the kernel is specialised by; mirror of the struct in `combine_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_ep::CombineConfig"
    row_type: RowType
    has_wide_idx: bool


class CombineParams(ParamsStruct):
    """Parameters of the kernel; mirror of the struct in `combine_params.cuh`, which says what they are."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::CombineParams"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("state", Pointer),
        ("opening_offset", UInt64),
        ("arrivals_offset", UInt64),
        ("opening", Opening),
        ("x", Pointer),
        ("weights", Pointer),
        ("metadata", Pointer),
        ("recv_row_ends", Pointer),
        ("num_send_rows", Pointer),
        ("topk_idx", Pointer),
        ("row_of_entry", Pointer),
        ("expert_row_of_entry", Pointer),
        ("biases", Pointer * _MAX_BIASES),
        ("out", Pointer),
        ("out_weights", Pointer),
        ("num_tokens", Int32),
        ("num_topk", Int32),
        ("num_experts", Int32),
        ("num_max_tokens", Int32),
        ("row_bytes", Int32),
        ("do_expand", Bool),
        ("is_single_rounding", Bool),
        ("has_weights", Bool),
    )


def combine_spec(*, dtype: torch.dtype, idx_dtype: torch.dtype) -> KernelSpec:
    """The kernel for rows of a dtype.

    Args:
        dtype: Of the rows: bfloat16, float16, float32 or float64.
        idx_dtype: Of `topk_idx`: int64 or int32.

    Raises:
        ConfigError: A dtype is none of these.
    """
    if dtype not in _ROW_TYPES or idx_dtype not in _HAS_WIDE_IDX:
        raise ConfigError(
            "combine must have rows of bfloat16, float16, float32 or float64 and topk_idx of int64 or int32 "
            f"(got {dtype} and {idx_dtype}); cast them"
        )
    return KernelSpec(
        label="combine",
        header="deep_ep_ep/combine_kernel.cuh",
        function="deep_ep_ep::combine",
        params_type=CombineParams,
        include_dirs=(package_include_dir("deep_ep_core"), package_include_dir("deep_ep_ep")),
        max_threads_per_block=COMBINE_THREADS,
        config=CombineConfig(row_type=_ROW_TYPES[dtype], has_wide_idx=_HAS_WIDE_IDX[idx_dtype]),
    )


def all_combine_specs() -> list[KernelSpec]:
    """Every variant, for `python -m deep_ep_core.jit precompile`."""
    return [combine_spec(dtype=dtype, idx_dtype=idx_dtype) for dtype in _ROW_TYPES for idx_dtype in _HAS_WIDE_IDX]


def combine_launch_shape(num_sms: int) -> LaunchShape:
    """One block an SM. They wait for each other and for those of the peers: all must be resident at once.

    Args:
        num_sms: SMs to use.
    """
    return LaunchShape(grid=(num_sms, 1, 1), block=(COMBINE_THREADS, 1, 1), smem_bytes=COMBINE_SMEM_BYTES)


def combine_slab_bytes(
    *,
    num_ranks: int,
    num_topk: int,
    num_max_tokens: int,
    row_bytes: int,
    is_single_rounding: bool,
    has_weights: bool,
) -> int:
    """Bytes of the slab that a rank needs for what is pushed to it; `Slab` in `combine_params.cuh`.

    Args:
        num_ranks: Ranks of the group.
        num_topk: Entries of a token's routing.
        num_max_tokens: The most tokens of any rank.
        row_bytes: Bytes of a row.
        is_single_rounding: Whether the rows of a token's entries are sent one by one.
        has_weights: Whether weights are combined.
    """
    num_layers = num_topk if is_single_rounding else min(num_ranks, num_topk)
    weights_bytes = num_topk * _WEIGHT_BYTES if has_weights else 0
    return num_layers * num_max_tokens * (row_bytes + weights_bytes)
