"""Owns what a case of the benchmark is: its call, its sizes, the bytes that it must move. It runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

__all__ = ["DTYPE", "OPS", "Case", "Op"]

Op = Literal["all_gather", "all_gather_in_place", "reduce_scatter"]
OPS = get_args(Op)
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One call on tensors of `DTYPE`.

    Attributes:
        op: The call.
        slot_bytes: What each rank passes to an all-gather, or gets from a reduce-scatter.
        num_ranks: Number of ranks.
    """

    op: Op
    slot_bytes: int
    num_ranks: int

    @property
    def num_elements(self) -> int:
        """Elements of a slot."""
        return self.slot_bytes // DTYPE.itemsize

    @property
    def bytes_of_rank(self) -> int:
        """Bytes that one rank's part reads and writes, wherever they lie.

        A slot is read and written for each rank it goes to, but not where it lies in place. A sum reads all its addends
        and writes its result once.
        """
        num_copies = self.num_ranks - (self.op == "all_gather_in_place")
        copied = 2 * num_copies * self.slot_bytes
        return copied + (self.num_ranks + 1) * self.slot_bytes if self.op == "reduce_scatter" else copied
