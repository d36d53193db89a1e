"""Owns the Python side of the kernel that copies fetched rows: mirrors, variants, and the launch shape.

What the parameters are filled with is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from deep_ep_core.align import ceil_div
from deep_ep_core.jit import KernelSpec, LaunchShape, package_include_dir
from deep_ep_core.jit.structs import Bool, ConfigStruct, Int32, Int64, ParamsStruct, Pointer, UInt64
from deep_ep_core.wait import WaitParams

__all__ = [
    "FETCH_THREADS",
    "MAX_FETCH_BLOCKS",
    "WORD_BYTES",
    "EntryTable",
    "FetchConfig",
    "FetchParams",
    "IndexList",
    "StagedRows",
    "all_fetch_specs",
    "fetch_launch_shape",
    "fetch_spec",
    "word_bytes_of",
]

WORD_BYTES = (16, 8, 4, 2, 1)
"""What a single load may move."""

FETCH_THREADS = 512
"""Threads of a block."""

MAX_FETCH_BLOCKS = 32
"""The most blocks of a fetch. They have 2 MiB under way, see `row_copy.cuh`: more SMs would bring no entry sooner."""

# As in `row_copy.cuh`.
_WARP_THREADS = 32
_SEGMENT_WORDS = 256


class EntryTable(ParamsStruct):
    """Where entries lie; mirror of the struct in `entry_table.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_engram::EntryTable"
    _fields_ = (("starts", Pointer), ("entries", Pointer), ("num_ranks", Int32))


class IndexList(ParamsStruct):
    """The indices of a fetch; mirror of the struct in `entry_table.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_engram::IndexList"
    _fields_ = (("values", Pointer), ("is_wide", Bool))


class StagedRows(ParamsStruct):
    """Rows that came over the network; mirror of the struct in `fetch_params.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_engram::StagedRows"
    _fields_ = (("rows", Pointer), ("slot_of_row", Pointer), ("row_of_slot", Pointer))


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig(ConfigStruct):
    """What the kernel is specialised by; mirror of the struct in `fetch_params.cuh`."""

    cuda_name: ClassVar[str] = "deep_ep_engram::FetchConfig"
    word_bytes: int


class FetchParams(ParamsStruct):
    """Parameters of the kernel; mirror of the struct in `fetch_params.cuh`, which says what they are."""

    __slots__ = ()
    cuda_name = "deep_ep_engram::FetchParams"
    _fields_ = (
        ("table", EntryTable),
        ("indices", IndexList),
        ("report", WaitParams),
        ("staged", StagedRows),
        ("data", Pointer),
        ("sf", Pointer),
        ("out_sf", Pointer),
        ("num_rows", Int64),
        ("row_bytes", Int64),
        ("sf_token_stride", Int64),
        ("sf_column_stride", Int64),
        ("fetch_idx", UInt64),
        ("num_each", Int32),
        ("num_packs", Int32),
        ("is_staged", Bool),
    )


def fetch_spec(word_bytes: int) -> KernelSpec:
    """The kernel for rows of whole words.

    Args:
        word_bytes: One of `WORD_BYTES`.
    """
    return KernelSpec(
        label="engram_fetch",
        header="deep_ep_engram/fetch_rows.cuh",
        function="deep_ep_engram::fetch_rows",
        params_type=FetchParams,
        include_dirs=(package_include_dir("deep_ep_core"), package_include_dir("deep_ep_engram")),
        max_threads_per_block=FETCH_THREADS,
        config=FetchConfig(word_bytes=word_bytes),
    )


def all_fetch_specs() -> list[KernelSpec]:
    """Every variant, for `python -m deep_ep_core.jit precompile`."""
    return [fetch_spec(word_bytes) for word_bytes in WORD_BYTES]


def word_bytes_of(row_bytes: int) -> int:
    """The largest word that rows of that size are whole numbers of. Rows lie densely, so it also divides addresses."""
    return next(word_bytes for word_bytes in WORD_BYTES if row_bytes % word_bytes == 0)


def fetch_launch_shape(num_rows: int, row_bytes: int, *, max_blocks: int) -> LaunchShape:
    """A warp for each segment that is copied at once, in as many blocks as may be.

    Args:
        num_rows: Rows to copy, at least 1.
        row_bytes: Bytes of a row.
        max_blocks: The most blocks.
    """
    row_words = row_bytes // word_bytes_of(row_bytes)
    num_segments = num_rows * ceil_div(row_words, _SEGMENT_WORDS)
    if row_words < _SEGMENT_WORDS:
        # Several short rows make a segment; a warp also looks each of them up.
        num_segments = ceil_div(num_rows, min(_SEGMENT_WORDS // row_words, _WARP_THREADS))
    num_blocks = min(ceil_div(num_segments, FETCH_THREADS // _WARP_THREADS), max_blocks)
    return LaunchShape(grid=(num_blocks, 1, 1), block=(FETCH_THREADS, 1, 1))
