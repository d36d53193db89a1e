"""Owns what a call must look like: every argument is checked here, before anything is sent.

Whether the ranks agree is checked by the exchange that opens an operation; what they must agree on is listed here too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError
from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField
from deep_ep_engram.sizing import SIZE_ALIGNMENT_BYTES, STORAGE_DTYPES

__all__ = [
    "FetchArgs",
    "TableFacts",
    "TableShape",
    "WriteArgs",
    "agreed_by_table",
    "agreed_by_write",
    "check_fetch",
    "check_range",
    "check_sf_rows",
    "check_table",
    "check_write",
    "out_of_range",
]

_DEVICE_TYPES = ("cpu", "cuda")
_INDEX_DTYPES = (torch.int32, torch.int64)
_SF_PACK_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """What the checks need to know of a table.

    Attributes:
        rank: This rank.
        num_bytes: Bytes of the table and of the rows of one fetch together.
        num_cpu_bytes: Of these, bytes of host memory for the entries; 0 keeps them in device memory.
    """

    rank: int
    num_bytes: int
    num_cpu_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TableShape:
    """The table that was written last, as all ranks know it.

    Attributes:
        num_entries_of_rank: Entries of each rank.
        hidden: Elements of an entry.
        dtype: Their dtype.
        device: Where this rank's calls take and return tensors.
        num_packs: Scale packs of an entry, 0 without scales.
    """

    num_entries_of_rank: tuple[int, ...]
    hidden: int
    dtype: torch.dtype
    device: torch.device
    num_packs: int

    @property
    def starts(self) -> list[int]:
        """Index of each rank's first entry, and the number of all entries at the end."""
        return list(itertools.accumulate(self.num_entries_of_rank, initial=0))

    @property
    def num_entries(self) -> int:
        """Entries of all ranks."""
        return sum(self.num_entries_of_rank)

    @property
    def row_bytes(self) -> int:
        """Bytes of an entry."""
        return self.hidden * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WriteArgs:
    """The arguments of a write after the checks."""

    storage: torch.Tensor
    sf: torch.Tensor | None

    @property
    def num_packs(self) -> int:
        """Scale packs of an entry, 0 without scales."""
        return 0 if self.sf is None else self.sf.size(1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FetchArgs:
    """The arguments of a fetch after the checks."""

    indices: torch.Tensor
    num_qps: int
    use_tma_aligned_col_major_sf: bool


def _shown(value: Any) -> str:
    """Shape, dtype, layout and device of a tensor, or the type of something else, for a message."""
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    layout = "" if value.is_contiguous() else f" with strides {list(value.stride())}"
    return f"{list(value.shape)} {_short(value.dtype)}{layout} on {value.device}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_matrix(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.is_contiguous()


def check_table(num_bytes: Any, num_cpu_bytes: Any, num_cpu_timeout_secs: float) -> None:
    """Check the arguments of the constructor, but for the backend."""
    for name, value, low in (("num_bytes", num_bytes, SIZE_ALIGNMENT_BYTES), ("num_cpu_bytes", num_cpu_bytes, 0)):
        if not isinstance(value, int) or value < low or value % SIZE_ALIGNMENT_BYTES:
            raise ConfigError(
                f"{name} must be a multiple of {SIZE_ALIGNMENT_BYTES}, at least {low} (got {value!r}); "
                "EngramTable.get_engram_storage_size_hint(...) gives the parts"
            )
    if num_cpu_bytes > num_bytes:
        raise ConfigError(
            f"num_bytes must hold num_cpu_bytes too (got {num_bytes} and {num_cpu_bytes}); pass the sum of both parts "
            "of EngramTable.get_engram_storage_size_hint(...)"
        )
    if not num_cpu_timeout_secs > 0:
        raise ConfigError(f"num_cpu_timeout_secs must be positive (got {num_cpu_timeout_secs})")


def agreed_by_table(num_bytes: int, num_cpu_bytes: int) -> list[AgreedField]:
    """The sizes that every rank must pass alike."""
    return [
        AgreedField(name="num_bytes", value=num_bytes),
        AgreedField(name="num_cpu_bytes", value=num_cpu_bytes),
    ]


def check_write(facts: TableFacts, storage: Any, sf: Any) -> WriteArgs:
    """Check the arguments of a write; the rows of `sf` are for `check_sf_rows`."""
    is_storage = _is_matrix(storage) and storage.size(1) > 0 and storage.dtype in STORAGE_DTYPES
    if not is_storage or storage.device.type not in _DEVICE_TYPES:
        raise rejected(
            facts.rank,
            "storage must be [num_entries, hidden] bfloat16 or float8_e4m3fn, contiguous, on the CPU or a CUDA device",
            _shown(storage),
            "reshape, cast, move or call .contiguous()",
        )
    is_fp8 = storage.dtype == torch.float8_e4m3fn
    if is_fp8 != (sf is not None):
        raise rejected(
            facts.rank,
            "sf must be given with float8_e4m3fn storage, and only then",
            f"{'no sf' if sf is None else 'sf'} with {_short(storage.dtype)}",
            "pass the scales of all entries, or drop them",
        )
    if is_fp8:
        is_sf = _is_matrix(sf) and sf.size(1) > 0 and sf.element_size() == _SF_PACK_BYTES
        if not is_sf or sf.device != storage.device:
            raise rejected(
                facts.rank,
                f"sf must be [num_entries of all ranks, num_packs] of 4-byte elements, contiguous, on {storage.device}",
                _shown(sf),
                "gather the scales of all ranks, reshape, cast, move or call .contiguous()",
            )
    capacity_bytes = facts.num_cpu_bytes or facts.num_bytes
    if storage.nbytes > capacity_bytes:
        raise rejected(
            facts.rank,
            f"the entries of a rank must fit into the table's {capacity_bytes} bytes",
            f"{storage.nbytes} bytes",
            "make the table with the sizes of EngramTable.get_engram_storage_size_hint(...)",
        )
    return WriteArgs(storage=storage.detach(), sf=None if sf is None else sf.detach())


def agreed_by_write(args: WriteArgs) -> list[AgreedField]:
    """The arguments of a write that every rank must pass alike; the number of entries may differ."""
    return [
        AgreedField(name="hidden size of storage", value=args.storage.size(1)),
        AgreedField.of_dtype("dtype of storage", args.storage.dtype),
        AgreedField(
            name="device type of storage",
            value=_DEVICE_TYPES.index(args.storage.device.type),
            show=lambda value: _DEVICE_TYPES[value],
        ),
        AgreedField(name="number of rows of sf", value=0 if args.sf is None else len(args.sf)),
        AgreedField(name="number of packs of sf", value=args.num_packs),
        AgreedField.of_dtype("dtype of sf", None if args.sf is None else args.sf.dtype),
    ]


def check_sf_rows(rank: int, args: WriteArgs, num_entries: int) -> None:
    """Check that there are scales for all entries of all ranks, which agree on both numbers."""
    if args.sf is not None and len(args.sf) != num_entries:
        raise rejected(
            rank,
            f"sf must have a row for each of the {num_entries} entries of all ranks",
            f"{len(args.sf)} rows",
            "gather the scales of all ranks, in the order of the ranks",
        )


def check_fetch(
    facts: TableFacts, shape: TableShape | None, indices: Any, num_qps: Any, use_tma_aligned_col_major_sf: bool
) -> FetchArgs:
    """Check the arguments of a fetch, but for the indices' values, which are for the backend."""
    if shape is None:
        raise rejected(
            facts.rank, "engram_fetch needs a table that was written", "none", "call engram_write on every rank first"
        )
    if not _is_matrix(indices) or indices.dtype not in _INDEX_DTYPES or indices.device != shape.device:
        raise rejected(
            facts.rank,
            "indices must be [num_tokens, num_entries_per_token] int32 or int64, contiguous, "
            f"on the table's device {shape.device}",
            _shown(indices),
            "reshape, cast, move or call .contiguous()",
        )
    if not isinstance(num_qps, int) or num_qps < 0:
        raise rejected(facts.rank, "num_qps must be an integer >= 0", repr(num_qps), "0 takes the default")
    # In device memory the entries take their part of the bytes first.
    entry_bytes = shape.num_entries_of_rank[facts.rank] * shape.row_bytes
    used_bytes = facts.num_cpu_bytes or align_up(entry_bytes, SIZE_ALIGNMENT_BYTES)
    if indices.numel() * shape.row_bytes > facts.num_bytes - used_bytes:
        raise rejected(
            facts.rank,
            f"the rows of one fetch must fit into the table's {facts.num_bytes - used_bytes} bytes for them",
            f"{indices.numel() * shape.row_bytes} bytes",
            "fetch less at a time, or make the table with the larger num_max_tokens_per_rank of "
            "EngramTable.get_engram_storage_size_hint(...)",
        )
    return FetchArgs(indices=indices, num_qps=num_qps, use_tma_aligned_col_major_sf=bool(use_tma_aligned_col_major_sf))


def check_range(rank: int, num_entries: int, indices: torch.Tensor) -> None:
    """Check the values of indices. On CUDA the host waits for them."""
    if not indices.numel():
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low >= 0 and high < num_entries:
        return
    is_outside = (indices < 0) | (indices >= num_entries)
    place = is_outside.nonzero()[0].tolist()
    raise out_of_range(
        rank,
        num_entries,
        f"{int(indices[tuple(place)])} at {place}, {int(is_outside.sum())} such of {math.prod(indices.shape)}",
    )


def out_of_range(rank: int, num_entries: int, found: str) -> ConfigError:
    """The error for indices that name no entry.

    Args:
        rank: The rank that wants them.
        num_entries: Entries of all ranks.
        found: One of the indices, and where it stands.
    """
    return rejected(
        rank,
        f"indices must lie in [0, {num_entries}), the entries of all ranks",
        found,
        "look at how they were computed",
    )
