"""Owns how the tensors of a session lie in the buffer's memory: regions, and one slot for each rank in a region.

It does not know which regions are in use; `session` hands them out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.align import align_up

__all__ = ["REGION_ALIGNMENT_BYTES", "Region", "bytes_of", "session_bytes"]

REGION_ALIGNMENT_BYTES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Where one tensor is gathered, or where the addends of one sum arrive: the slots of all ranks, back to back.

    Only the region is aligned. The slot of rank r begins at `offset + r * slot_bytes`, whatever that is a multiple of.

    Attributes:
        offset: First byte, in the buffer's memory.
        num_ranks: Number of slots.
        shape: Shape of the tensor in a slot.
        dtype: Its dtype.
    """

    offset: int
    num_ranks: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        """Elements of a slot."""
        return math.prod(self.shape)

    @property
    def slot_bytes(self) -> int:
        """Size of a slot."""
        return self.num_elements * self.dtype.itemsize

    @property
    def aligned_end(self) -> int:
        """Where the next region begins."""
        return self.offset + align_up(self.slot_bytes * self.num_ranks, REGION_ALIGNMENT_BYTES)

    def slots(self, memory: torch.Tensor) -> torch.Tensor:
        """The region as bytes, `[num_ranks, slot_bytes]` uint8; a view of `memory`, which is flat uint8."""
        return self._bytes(memory).view(self.num_ranks, self.slot_bytes)

    def view(self, memory: torch.Tensor) -> torch.Tensor:
        """The region as `[num_ranks, *shape]`; a view of `memory`."""
        return self._bytes(memory).view(self.dtype).view(self.num_ranks, *self.shape)

    def _bytes(self, memory: torch.Tensor) -> torch.Tensor:
        return memory[self.offset : self.offset + self.slot_bytes * self.num_ranks]


def session_bytes(shapes: Sequence[Sequence[int]], dtype: torch.dtype, *, num_ranks: int) -> int:
    """Bytes that one region for each shape takes."""
    end = 0
    for shape in shapes:
        end = Region(offset=end, num_ranks=num_ranks, shape=tuple(shape), dtype=dtype).aligned_end
    return end


def bytes_of(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    """A contiguous tensor of at least one element as `[num_rows, row_bytes]` uint8, sharing its memory."""
    return tensor.view(-1).view(torch.uint8).view(num_rows, -1)
