"""Owns the kernels of a combine across nodes as the host sees them: mirrors of their parameters, specs, launch shape.

What the parameters are filled with is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from deep_ep_core.align import align_up
from deep_ep_core.jit import KernelSpec
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, ParamsStruct, Pointer, UInt64
from deep_ep_ep.device.combine_kernel import COMBINE_THREADS, RowType, combine_spec
from deep_ep_ep.device.network.params import INCLUDE_DIRS, Network, gin_call_type

__all__ = [
    "NetworkCombineConfig",
    "NetworkCombineParams",
    "all_combine_specs",
    "forward_spec",
    "return_bytes",
    "stage_spec",
    "sum_rows_spec",
]

_MAX_BIASES = 2
_WEIGHT_BYTES = 4
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkCombineConfig(ConfigStruct):
    """What the kernels are specialised by; mirror of the struct in `network/combine_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_ep::NetworkCombineConfig"
    row_type: RowType
    has_wide_idx: bool


class NetworkCombineParams(ParamsStruct):
    """What the kernels are passed; mirror of the struct in `network/combine_params.cuh`, which says what they are."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::NetworkCombineParams"
    _fields_ = (
        ("net", Network),
        ("x", Pointer),
        ("weights", Pointer),
        ("metadata", Pointer),
        ("recv_row_ends", Pointer),
        ("expert_ends", Pointer),
        ("staged_x", Pointer),
        ("staged_weights", Pointer),
        ("topk_idx", Pointer),
        ("row_of_entry", Pointer),
        ("slot_of_entry", Pointer),
        ("relay_counts", Pointer),
        ("forward_table", Pointer),
        ("biases", Pointer * _MAX_BIASES),
        ("out", Pointer),
        ("out_weights", Pointer),
        ("return_offset", UInt64),
        ("send_offset", UInt64),
        ("num_tokens", Int32),
        ("num_topk", Int32),
        ("num_experts", Int32),
        ("num_max_tokens", Int32),
        ("row_bytes", Int32),
        ("return_bytes", Int32),
        ("num_layers", Int32),
        ("max_record_rows", Int32),
        ("chunk_rows", Int32),
        ("do_expand", Bool),
        ("is_single_rounding", Bool),
        ("is_hierarchical", Bool),
        ("has_weights", Bool),
    )


def return_bytes(*, row_bytes: int, num_topk: int, has_weights: bool) -> int:
    """Bytes of a row that comes back, with the weights of its token behind it."""
    return row_bytes + (align_up(num_topk * _WEIGHT_BYTES, _ALIGNMENT) if has_weights else 0)


def stage_spec(*, dtype: torch.dtype) -> KernelSpec:
    """The kernel that makes rows ready for the ranks of the node.

    Args:
        dtype: Of the rows: bfloat16, float16, float32 or float64.

    Raises:
        ConfigError: It is none of these.
    """
    return KernelSpec(
        label="network_stage_rows",
        header="deep_ep_ep/network/stage_rows.cuh",
        function="deep_ep_ep::stage_rows_for_node",
        params_type=NetworkCombineParams,
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=COMBINE_THREADS,
        config=_config(dtype, torch.int64),
    )


def forward_spec(dev_comm_bytes: int, *, dtype: torch.dtype) -> KernelSpec:
    """The kernel by which relays bring rows back.

    Args:
        dev_comm_bytes: `sizeof(ncclDevComm)` of the NCCL that runs.
        dtype: As for `stage_spec`.

    Raises:
        ConfigError: As for `stage_spec`.
    """
    return _gin_spec("forward_rows", "forward_rows_to_sources", dev_comm_bytes, _config(dtype, torch.int64))


def sum_rows_spec(dev_comm_bytes: int, *, dtype: torch.dtype, idx_dtype: torch.dtype) -> KernelSpec:
    """The kernel that sums up what came back.

    Args:
        dev_comm_bytes: As for `forward_spec`.
        dtype: As for `stage_spec`.
        idx_dtype: Of `topk_idx`: int64 or int32.

    Raises:
        ConfigError: A dtype is none of these.
    """
    return _gin_spec("sum_rows", "sum_rows_of_tokens", dev_comm_bytes, _config(dtype, idx_dtype))


def all_combine_specs(dev_comm_bytes: int, *, dtype: torch.dtype, idx_dtype: torch.dtype) -> list[KernelSpec]:
    """Every kernel of a combine of such tensors, in their order."""
    return [
        stage_spec(dtype=dtype),
        forward_spec(dev_comm_bytes, dtype=dtype),
        sum_rows_spec(dev_comm_bytes, dtype=dtype, idx_dtype=idx_dtype),
    ]


def _config(dtype: torch.dtype, idx_dtype: torch.dtype) -> NetworkCombineConfig:
    # The combine of one node takes the same dtypes, and says what is wrong with others.
    config = combine_spec(dtype=dtype, idx_dtype=idx_dtype).config
    return NetworkCombineConfig(row_type=config.row_type, has_wide_idx=config.has_wide_idx)  # type: ignore[union-attr]


def _gin_spec(header: str, function: str, dev_comm_bytes: int, config: NetworkCombineConfig) -> KernelSpec:
    return KernelSpec(
        label=f"network_{header}",
        header=f"deep_ep_ep/network/{header}.cuh",
        function=f"deep_ep_ep::{function}",
        params_type=gin_call_type(NetworkCombineParams, "deep_ep_ep::NetworkCombineCall", dev_comm_bytes),
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=COMBINE_THREADS,
        config=config,
        needs_nccl=True,
    )
