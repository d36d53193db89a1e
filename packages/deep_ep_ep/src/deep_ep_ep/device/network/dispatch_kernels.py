"""Owns the kernels of a dispatch across nodes as the host sees them: mirrors of their parameters, specs, launch shapes.

What the parameters are filled with is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, ParamsStruct, Pointer, UInt64
from deep_ep_ep.device.dispatch_kernel import DispatchParams, RowStages
from deep_ep_ep.device.network.params import INCLUDE_DIRS, Network, gin_call_type

__all__ = [
    "NUM_RELAY_COUNTS",
    "PLAN_TILE_TOKENS",
    "NetworkDispatchParams",
    "NetworkIndexConfig",
    "all_dispatch_specs",
    "chunk_rows",
    "count_spec",
    "find_spec",
    "forward_table_words",
    "move_launch_shape",
    "place_spec",
    "plan_launch_shape",
    "receive_launch_shape",
    "receive_spec",
    "record_bytes",
    "send_spec",
    "sum_launch_shape",
    "sum_spec",
    "write_spec",
]

PLAN_TILE_TOKENS = 32
"""Tokens that are counted at a time, `kPlanTileTokens`."""

NUM_RELAY_COUNTS = 4
"""Rows of the counts of relays, `kNumRelayCounts`."""

_PLAN_THREADS = 256
_MOVE_THREADS = 512
_RECEIVE_THREADS = 512
_WORD_BYTES = 4
_ALIGNMENT = 16
# What is put at once: enough for a message to take far longer than to ask for it, and few enough for many to be on
# their way. Not measured on a network.
_CHUNK_BYTES = 256 * 1024
_MAX_CHUNK_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkIndexConfig(ConfigStruct):
    """What kernels that read `topk_idx` are specialised by; mirror of the struct in `network/dispatch_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_ep::NetworkIndexConfig"
    is_idx64: bool


class NetworkDispatchParams(ParamsStruct):
    """What the kernels are passed; mirror of the struct in `network/dispatch_params.cuh`, which says what they are."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::NetworkDispatchParams"
    _fields_ = (
        ("net", Network),
        ("local", DispatchParams),
        ("tile_counts", Pointer),
        ("first_rows", Pointer),
        ("sent_tokens", Pointer),
        ("slot_of_entry", Pointer),
        ("relay_counts", Pointer),
        ("scaleup_row_ends", Pointer),
        ("forward_table", Pointer),
        ("recv_offset", UInt64),
        ("send_offset", UInt64),
        ("record_bytes", Int32),
        ("chunk_rows", Int32),
        ("is_single_rounding", Bool),
    )


def record_bytes(*, row_bytes: int, side_bytes: int, num_topk: int) -> int:
    """Bytes of a token's record between nodes: its row, its side record, and its row at each receiver."""
    return align_up(row_bytes + side_bytes + num_topk * _WORD_BYTES, _ALIGNMENT)


def chunk_rows(row_bytes: int) -> int:
    """Rows that are put at once: as many as fit 256 KiB, at least one and at most 256.

    Args:
        row_bytes: Bytes of one, with what belongs to it.
    """
    return max(1, min(_CHUNK_BYTES // row_bytes, _MAX_CHUNK_ROWS))


def forward_table_words(num_topk: int) -> int:
    """Words of a record of the forward table: the token, and for each entry a row and whose it is."""
    return 2 * num_topk + 1


def count_spec(*, is_idx64: bool) -> KernelSpec:
    """The kernel that counts the tokens of each tile."""
    return _plan_spec("count", "count_tokens", "count_tokens_of_tiles", NetworkIndexConfig(is_idx64=is_idx64))


def sum_spec() -> KernelSpec:
    """The kernel that adds up the counts of tiles."""
    return _plan_spec("sum_tiles", "sum_tiles", "sum_tiles")


def find_spec() -> KernelSpec:
    """The kernel that finds where tokens begin at their receivers."""
    return _plan_spec("find_first_rows", "find_first_rows", "find_first_rows_of_ranks")


def write_spec(*, is_idx64: bool) -> KernelSpec:
    """The kernel that writes the rows of every token."""
    return _plan_spec("write_rows", "write_rows", "write_rows_of_tiles", NetworkIndexConfig(is_idx64=is_idx64))


def send_spec(dev_comm_bytes: int, *, is_idx64: bool) -> KernelSpec:
    """The kernel that puts records to relays.

    Args:
        dev_comm_bytes: `sizeof(ncclDevComm)` of the NCCL that runs.
        is_idx64: `topk_idx` is int64, not int32.
    """
    config = NetworkIndexConfig(is_idx64=is_idx64)
    return _gin_spec("send_rows", "send_rows_to_relays", dev_comm_bytes, config)


def place_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel that hands rows on inside the node; see `send_spec`."""
    return _gin_spec("place_rows", "place_rows_in_node", dev_comm_bytes)


def receive_spec(*, is_idx64: bool) -> KernelSpec:
    """The kernel that writes the results."""
    return KernelSpec(
        label="network_receive_rows",
        header="deep_ep_ep/network/receive_rows.cuh",
        function="deep_ep_ep::receive_rows_of_sources",
        params_type=NetworkDispatchParams,
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=_RECEIVE_THREADS,
        config=NetworkIndexConfig(is_idx64=is_idx64),
    )


def all_dispatch_specs(dev_comm_bytes: int, *, is_idx64: bool) -> list[KernelSpec]:
    """Every kernel of a dispatch with such a `topk_idx`, in their order."""
    return [
        count_spec(is_idx64=is_idx64),
        sum_spec(),
        find_spec(),
        write_spec(is_idx64=is_idx64),
        send_spec(dev_comm_bytes, is_idx64=is_idx64),
        place_spec(dev_comm_bytes),
        receive_spec(is_idx64=is_idx64),
    ]


def plan_launch_shape(num_sms: int, *, num_columns: int = 0) -> LaunchShape:
    """Blocks that need not be resident at once.

    Args:
        num_sms: Number of blocks.
        num_columns: Columns that a block counts; 0 in a kernel that counts none.
    """
    return LaunchShape(grid=(num_sms, 1, 1), block=(_PLAN_THREADS, 1, 1), smem_bytes=num_columns * _WORD_BYTES)


def sum_launch_shape(num_columns: int) -> LaunchShape:
    """One thread a column."""
    return LaunchShape(grid=(ceil_div(num_columns, _PLAN_THREADS), 1, 1), block=(_PLAN_THREADS, 1, 1))


def move_launch_shape(num_sms: int) -> LaunchShape:
    """One block an SM."""
    return LaunchShape(grid=(num_sms, 1, 1), block=(_MOVE_THREADS, 1, 1))


def receive_launch_shape(num_sms: int, stages: RowStages) -> LaunchShape:
    """One block an SM, with the stages of rows that are copied on."""
    return LaunchShape(grid=(num_sms, 1, 1), block=(_RECEIVE_THREADS, 1, 1), smem_bytes=stages.smem_bytes)


def _plan_spec(label: str, header: str, function: str, config: NetworkIndexConfig | None = None) -> KernelSpec:
    return KernelSpec(
        label=f"network_{label}",
        header=f"deep_ep_ep/network/{header}.cuh",
        function=f"deep_ep_ep::{function}",
        params_type=NetworkDispatchParams,
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=_PLAN_THREADS,
        config=config,
    )


def _gin_spec(header: str, function: str, dev_comm_bytes: int, config: NetworkIndexConfig | None = None) -> KernelSpec:
    return KernelSpec(
        label=f"network_{header}",
        header=f"deep_ep_ep/network/{header}.cuh",
        function=f"deep_ep_ep::{function}",
        params_type=gin_call_type(NetworkDispatchParams, "deep_ep_ep::NetworkDispatchCall", dev_comm_bytes),
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=_MOVE_THREADS,
        config=config,
        needs_nccl=True,
    )
