"""Owns the window of one buffer: the regions' memory and the words by which ranks meet, and where peers have theirs.

What the words mean is in `meetings`.
"""

from __future__ import annotations

import torch

from deep_ep_core.errors import TopologyError
from deep_ep_core.nccl import Communicator
from deep_ep_core.window import ControlRegion, SymmetricMemory

__all__ = ["NUM_HALVES", "WORD_BYTES", "ContextMemory"]

WORD_BYTES = 8
NUM_HALVES = 2
"""Tables of digests, used in turn: a peer may be one meeting ahead of a rank, and never two."""

_DATA = "cp.data"
_ARRIVALS = "cp.arrivals"
_DIGESTS = "cp.digests"


class ContextMemory:
    """The memory of one buffer on one rank, and addresses in that of every rank.

    Args:
        communicator: The ranks, all of one LSA team.
        num_bytes: Size of the regions' memory; the same on every rank.

    Attributes:
        rank, num_ranks: This rank, and how many there are.
        device: Device of the memory.
        device_idx: Its index.
        data: Flat uint8 `[num_bytes]`, where regions lie. It keeps the memory alive.
        data_addresses: Where this rank sees `data` of each rank.

    Raises:
        TopologyError: The ranks are not of one LSA team.
        TransportError: There is not enough memory, or NCCL could not register it.

    Collective: the constructor is; `close` is not.
    """

    def __init__(self, communicator: Communicator, *, num_bytes: int) -> None:
        self.rank, self.num_ranks = communicator.rank, communicator.num_ranks
        if communicator.lsa.num_ranks != self.num_ranks:
            raise TopologyError(
                "the device backend of ContextBuffer needs all ranks in one LSA team (got teams of "
                f"{communicator.lsa.num_ranks} of {self.num_ranks} ranks, on rank {self.rank}): copy engines write "
                'over NVLink, not to other nodes; use backend="collective", or unset NCCL_LSA_TEAM_SIZE'
            )
        self._memory = SymmetricMemory(
            communicator,
            regions=[
                # First, so that regions are aligned as their offsets are.
                ControlRegion(name=_DATA, num_bytes=num_bytes, alignment=4096),
                ControlRegion(name=_ARRIVALS, num_bytes=self.num_ranks * WORD_BYTES),
                ControlRegion(name=_DIGESTS, num_bytes=NUM_HALVES * self.num_ranks * WORD_BYTES),
            ],
            heap_bytes=0,
        )
        self.device: torch.device = self._memory.device
        assert self.device.index is not None, "a communicator knows which device it is on"
        self.device_idx: int = self.device.index
        self.data = self._memory.control(_DATA)
        self.data_addresses = self._addresses(_DATA)
        self._arrivals = self._addresses(_ARRIVALS)
        self._digests = self._addresses(_DIGESTS)

    def arrival_address(self, at: int, of: int) -> int:
        """The word at one rank that counts the meetings which another one came to.

        Args:
            at: The rank that waits for it.
            of: The rank that writes it.
        """
        return self._arrivals[at] + of * WORD_BYTES

    def digest_address(self, at: int, half: int, of: int) -> int:
        """The word at one rank that says what another one came with.

        Args:
            at: The rank that reads it.
            half: Number of the meeting, modulo `NUM_HALVES`.
            of: The rank that writes it.
        """
        return self._digests[at] + (half * self.num_ranks + of) * WORD_BYTES

    def close(self) -> None:
        """Withdraw the window from the peers; what views `data` stays valid. May be repeated."""
        self._memory.close()

    def _addresses(self, region: str) -> list[int]:
        offset = self._memory.layout.offset_of(region)
        addresses = [self._memory.peer_address(rank, offset) for rank in range(self.num_ranks)]
        # By the check of the team, load and store reach every rank.
        assert None not in addresses, (region, addresses)
        return [address for address in addresses if address is not None]
