"""Owns the addresses of lanes: which word and which slots of whose window each end of a lane uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from deep_ep_core.window import ControlRegion
from deep_ep_pp.device.lanes import Lane
from deep_ep_pp.device.layout import WORD_BYTES, SlotLayout
from deep_ep_pp.device.links import CopyBatch, DirectLink, Link, Network, NetworkLink, Signals

__all__ = ["Wiring", "slot_region", "word_regions"]

_ARRIVALS = "pp.arrivals"
_CREDITS = "pp.credits"
_SLOTS = "pp.slots"
_SLOT_ALIGNMENT = 4096


class _Layout(Protocol):
    def offset_of(self, name: str) -> int: ...


class _Memory(Protocol):
    """Memory of every rank: `deep_ep_core.window.SymmetricMemory`."""

    @property
    def address(self) -> int: ...

    @property
    def layout(self) -> _Layout: ...

    def peer_address(self, rank: int, offset: int = 0) -> int | None: ...


def word_regions(num_ranks: int) -> list[ControlRegion]:
    """What the window of words holds: a word a rank for arrivals, and one for credits."""
    num_bytes = num_ranks * WORD_BYTES
    return [ControlRegion(name=name, num_bytes=num_bytes) for name in (_ARRIVALS, _CREDITS)]


def slot_region(layout: SlotLayout) -> ControlRegion:
    """What the window of slots holds."""
    # A single rank has no peers, and a region has a byte at least.
    return ControlRegion(name=_SLOTS, num_bytes=max(layout.num_bytes, 1), alignment=_SLOT_ALIGNMENT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wiring:
    """What lanes of one configuration are made of.

    Attributes:
        rank: This rank.
        num_ranks: Number of ranks.
        words: The window of words.
        slots: The window of slots.
        layout: Where slots lie there.
        signals: Words between streams.
        copy: Copies.
        network: The way to ranks that load and store do not reach; None where there are none.
    """

    rank: int
    num_ranks: int
    words: _Memory
    slots: _Memory
    layout: SlotLayout
    signals: Signals
    copy: CopyBatch
    network: Network | None

    def lanes(self, peers: Iterable[int], num_sent: Sequence[int]) -> dict[int, Lane]:
        """The lanes to some peers, when so many messages to each rank have been sent and taken."""
        return {peer: self._lane(peer, num_sent[peer]) for peer in peers}

    def _lane(self, peer: int, num_sent: int) -> Lane:
        return Lane(
            peer=peer,
            signals=self.signals,
            copy=self.copy,
            layout=self.layout,
            link=self._link(peer),
            slots_address=self.slots.address + self._recv_offset(receiver=self.rank, sender=peer),
            arrival_address=self.words.address + self._word_offset(_ARRIVALS, peer),
            credit_address=self.words.address + self._word_offset(_CREDITS, peer),
            num_sent_before=num_sent,
        )

    def _link(self, peer: int) -> Link:
        slots_offset = self._recv_offset(receiver=peer, sender=self.rank)
        arrival_offset = self._word_offset(_ARRIVALS, self.rank)
        credit_offset = self._word_offset(_CREDITS, self.rank)
        slots_address = self.slots.peer_address(peer, slots_offset)
        arrival_address = self.words.peer_address(peer, arrival_offset)
        credit_address = self.words.peer_address(peer, credit_offset)
        if slots_address is not None and arrival_address is not None and credit_address is not None:
            return DirectLink(
                self.signals,
                self.copy,
                self.layout,
                slots_address=slots_address,
                arrival_address=arrival_address,
                credit_address=credit_address,
            )
        assert self.network is not None, "there is a network where load and store do not reach all ranks"
        distance = (peer - self.rank) % self.num_ranks
        stage_offset = self.slots.layout.offset_of(_SLOTS) + self.layout.stage_offset(distance)
        return NetworkLink(
            self.signals,
            self.copy,
            self.network,
            self.layout,
            peer=peer,
            stage_address=self.slots.address + stage_offset,
            stage_offset=stage_offset,
            slots_offset=slots_offset,
            arrival_offset=arrival_offset,
            credit_offset=credit_offset,
        )

    def _recv_offset(self, *, receiver: int, sender: int) -> int:
        distance = (sender - receiver) % self.num_ranks
        return self.slots.layout.offset_of(_SLOTS) + self.layout.recv_offset(distance)

    def _word_offset(self, name: str, rank: int) -> int:
        return self.words.layout.offset_of(name) + rank * WORD_BYTES
