"""Owns the calls of `EngramTable` as functions, for code that passes a table around. It adds nothing to them."""

from __future__ import annotations

import torch

from deep_ep_engram.backend import FetchHook
from deep_ep_engram.table import EngramTable

__all__ = ["engram_fetch", "engram_write"]


def engram_write(table: EngramTable, storage: torch.Tensor, sf: torch.Tensor | None = None) -> None:
    """Fill a table; see `EngramTable.engram_write`. Collective: yes."""
    table.engram_write(storage, sf)


def engram_fetch(
    table: EngramTable, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
) -> FetchHook:
    """Begin to fetch entries of a table; see `EngramTable.engram_fetch`. Collective: yes."""
    return table.engram_fetch(indices, num_qps, use_tma_aligned_col_major_sf)
