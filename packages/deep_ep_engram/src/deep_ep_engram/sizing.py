"""Owns how many bytes a table needs. It allocates nothing."""

from __future__ import annotations

import torch

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError

__all__ = ["SIZE_ALIGNMENT_BYTES", "STORAGE_DTYPES", "get_engram_storage_size_hint"]

# Windows and their parts come in units of this size.
SIZE_ALIGNMENT_BYTES = 2 << 20
STORAGE_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
# The hint leaves room for rows that begin at multiples of this many bytes.
_ROW_ALIGNMENT_BYTES = 32


def get_engram_storage_size_hint(
    num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[int, int]:
    """The sizes of a table.

    Args:
        num_entries: Entries of the rank that has most.
        hidden: Elements of an entry.
        num_max_tokens_per_rank: Most entries that one fetch asks for: its tokens times the entries a token.
        dtype: bfloat16 or float8_e4m3fn.

    Returns:
        `(num_gpu_bytes, num_cpu_bytes)`, multiples of 2 MiB: what the rows of one fetch take, and what the entries
        take. `EngramTable(group, num_gpu_bytes + num_cpu_bytes, num_cpu_bytes)` keeps the entries in host memory,
        `EngramTable(group, num_gpu_bytes + num_cpu_bytes)` in device memory.

    Raises:
        ConfigError: A count is negative, or the dtype is another.

    Collective: no.
    """
    if min(num_entries, hidden, num_max_tokens_per_rank) < 0:
        raise ConfigError(
            "num_entries, hidden and num_max_tokens_per_rank must not be negative (got "
            f"{num_entries}, {hidden}, {num_max_tokens_per_rank}); pass counts"
        )
    if dtype not in STORAGE_DTYPES:
        raise ConfigError(f"the dtype of a table must be bfloat16 or float8_e4m3fn (got {dtype}); cast the entries")
    row_bytes = align_up(hidden * dtype.itemsize, _ROW_ALIGNMENT_BYTES)
    return (
        align_up(row_bytes * num_max_tokens_per_rank, SIZE_ALIGNMENT_BYTES),
        align_up(row_bytes * num_entries, SIZE_ALIGNMENT_BYTES),
    )
