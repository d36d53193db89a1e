"""Owns where the entries of a table lie so that kernels of other ranks read them: the window, in device memory.

Host memory is in `host_memory`. What is in the entries, and when they may be written, is not known here.
"""

from __future__ import annotations

from typing import Protocol

import torch

from deep_ep_core.nccl import Communicator
from deep_ep_core.window import ControlRegion, SymmetricMemory

__all__ = ["EntryStorage", "WindowStorage"]

_ENTRIES = "engram.entries"


class EntryStorage(Protocol):
    """Memory for the entries of each rank."""

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where kernels of this rank see the entries of each rank; 0 where no load reaches them."""

    def fill(self, entries: torch.Tensor) -> None:
        """Copy this rank's entries in, on the current stream of their device."""

    def close(self) -> None:
        """Let the memory go once the device has done what it was given; may be called again."""


class WindowStorage:
    """Entries in the symmetric window: ranks of the LSA team load them, others get them over the network.

    Args:
        communicator: The ranks.
        num_bytes: Size, the same on every rank.

    Attributes:
        memory: The window.
        offset: Where the entries of each rank begin in its window, in bytes; the same on every rank.
        addresses: See `EntryStorage`.

    Raises:
        TransportError: There is not enough memory, or NCCL could not register it.

    Collective: the constructor is; `close` is not.
    """

    def __init__(self, communicator: Communicator, num_bytes: int) -> None:
        # A region and not a heap tensor, since it must begin at one offset on all ranks.
        region = ControlRegion(name=_ENTRIES, num_bytes=num_bytes, alignment=256)
        self.memory = SymmetricMemory(communicator, regions=[region], heap_bytes=0)
        self.offset = self.memory.layout.offset_of(_ENTRIES)
        self.addresses: tuple[int, ...] = tuple(
            self.memory.peer_address(rank, self.offset) or 0 for rank in range(communicator.num_ranks)
        )

    def bytes_of_rank(self) -> torch.Tensor:
        """All bytes of this rank, flat; keeps the memory alive."""
        return self.memory.control(_ENTRIES)

    def fill(self, entries: torch.Tensor) -> None:
        """Copy this rank's entries in, on the current stream of their device."""
        if entries.numel():
            self.bytes_of_rank()[: entries.nbytes].copy_(entries.reshape(-1).view(torch.uint8))

    def close(self) -> None:
        """Withdraw the window, once the device has done what it was given; may be called again."""
        self.memory.close()
