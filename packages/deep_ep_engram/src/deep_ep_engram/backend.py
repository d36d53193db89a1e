"""Owns the contract between `EngramTable` and what moves its entries. Every backend gives the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from deep_ep_engram.checks import FetchArgs, TableShape, WriteArgs

__all__ = ["Backend", "FetchHook", "Fetched"]


class Fetched(NamedTuple):
    """What a fetch gives.

    Attributes:
        data: `[num_tokens, num_entries_per_token * hidden]` of the table's dtype: the entries of a token side by side.
        sf: `[num_tokens, num_entries_per_token * num_packs]` of the scales' dtype, or None without scales.
    """

    data: torch.Tensor
    sf: torch.Tensor | None


FetchHook = Callable[[], Fetched]
"""Waits for a fetch and returns what it gives; a second call returns the same tensors."""


class Backend(Protocol):
    """Keeps the entries of this rank and brings those of others. Arguments have passed the checks."""

    name: str

    def write(self, args: WriteArgs) -> TableShape:
        """Replace the table, once all ranks agree on it; collective."""

    def fetch(self, args: FetchArgs) -> FetchHook:
        """Begin to bring the entries of `args.indices`; collective where owners send their entries."""

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation, if there is a way to."""

    def close(self) -> None:
        """Complete the fetches under way, whose hooks stay valid, and release the table; may be called again."""
