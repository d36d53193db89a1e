"""Owns the ways to a peer: how a message gets into its slots, and how its slots are given back.

What both ends wait for is in `lanes`. Everything here is enqueued in a stream; nothing blocks the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from deep_ep_core.copy_engine import Copy
from deep_ep_pp.device.layout import HEADER_BYTES, WORD_BYTES, SlotLayout, encode_header, part_offsets

__all__ = ["CopyBatch", "DirectLink", "Link", "Network", "NetworkLink", "Part", "Signals"]

CopyBatch = Callable[[int, Sequence[Copy]], None]
"""Copies in a stream: `deep_ep_core.copy_engine.copy_batch`."""


class Part(NamedTuple):
    """A tensor of a message.

    Attributes:
        address: Where it is.
        num_bytes: Its size.
    """

    address: int
    num_bytes: int


class Signals(Protocol):
    """Words between streams: `deep_ep_core.stream_signals.StreamSignals`."""

    def write(self, stream: int, address: int, value: int) -> None:
        """Set a word behind what the stream has so far."""

    def write_all(self, stream: int, words: Sequence[tuple[int, int]]) -> None:
        """Set several words, given by address and value, in this order."""

    def wait(self, stream: int, address: int, least: int, *, peer: int, phase: str) -> None:
        """Let a stream wait until a word has come to a value."""


class Network(Protocol):
    """What reaches the windows of ranks that load and store do not reach: `deep_ep_pp.device.network.GinNetwork`."""

    def put_and_signal(
        self, stream: int, peer: int, *, to_offset: int, from_offset: int, num_bytes: int, word_offset: int
    ) -> None:
        """Copy between windows of slots, from this rank to a peer; then add 1 to a word of the peer.

        Args:
            stream: Handle of the stream.
            peer: The rank.
            to_offset: Where to, in the peer's slots.
            from_offset: Where from, in this rank's slots.
            num_bytes: How many; 0 only adds to the word.
            word_offset: The word, in the window of words.
        """


class Link(Protocol):
    """The way to one peer."""

    def deliver(self, stream: int, number: int, parts: Sequence[Part]) -> None:
        """Put a message into its slot at the peer, which is free, and say so."""

    def give_back(self, stream: int, number: int) -> None:
        """Tell the peer that its message of that number was taken, so that the slot is free."""


class DirectLink:
    """A peer whose window this GPU reaches: copies go from the tensors into its slots.

    Args:
        signals: Writes words.
        copy: Copies.
        layout: Where slots lie.
        slots_address: The peer's slots for this rank.
        arrival_address: The peer's word for messages of this rank that have arrived.
        credit_address: The peer's word for messages to this rank that were taken.
    """

    def __init__(
        self,
        signals: Signals,
        copy: CopyBatch,
        layout: SlotLayout,
        *,
        slots_address: int,
        arrival_address: int,
        credit_address: int,
    ) -> None:
        self._signals = signals
        self._copy = copy
        self._layout = layout
        self._slots_address = slots_address
        self._arrival_address = arrival_address
        self._credit_address = credit_address

    def deliver(self, stream: int, number: int, parts: Sequence[Part]) -> None:
        """As `Link.deliver`."""
        slot = self._slots_address + self._layout.slot_offset(number)
        _fill_slot(self._signals, self._copy, stream, slot, number, parts)
        self._signals.write(stream, self._arrival_address, number)

    def give_back(self, stream: int, number: int) -> None:
        """As `Link.give_back`."""
        self._signals.write(stream, self._credit_address, number)


class NetworkLink:
    """A peer on another node: copies go into this rank's stage, and the network puts them into the peer's slots.

    Each signal adds 1 to a word, so the words count as they do for a `DirectLink`.

    Args:
        signals: Writes words.
        copy: Copies.
        network: Puts and signals.
        layout: Where slots lie.
        peer: The rank.
        stage_address: This rank's stage for the peer.
        stage_offset: The same, in the window of slots.
        slots_offset: The peer's slots for this rank, in the window of slots.
        arrival_offset: The peer's word for messages of this rank that have arrived, in the window of words.
        credit_offset: The peer's word for messages to this rank that were taken, in the window of words.
    """

    def __init__(
        self,
        signals: Signals,
        copy: CopyBatch,
        network: Network,
        layout: SlotLayout,
        *,
        peer: int,
        stage_address: int,
        stage_offset: int,
        slots_offset: int,
        arrival_offset: int,
        credit_offset: int,
    ) -> None:
        self._signals = signals
        self._copy = copy
        self._network = network
        self._layout = layout
        self._peer = peer
        self._stage_address = stage_address
        self._stage_offset = stage_offset
        self._slots_offset = slots_offset
        self._arrival_offset = arrival_offset
        self._credit_offset = credit_offset

    def deliver(self, stream: int, number: int, parts: Sequence[Part]) -> None:
        """As `Link.deliver`. The stage is free: the message before in it was taken, so it has left."""
        offset = self._layout.slot_offset(number)
        _fill_slot(self._signals, self._copy, stream, self._stage_address + offset, number, parts)
        end = HEADER_BYTES
        for part_offset, part in zip(part_offsets([part.num_bytes for part in parts]), parts, strict=True):
            end = part_offset + part.num_bytes
        self._network.put_and_signal(
            stream,
            self._peer,
            to_offset=self._slots_offset + offset,
            from_offset=self._stage_offset + offset,
            num_bytes=end,
            word_offset=self._arrival_offset,
        )

    def give_back(self, stream: int, number: int) -> None:
        """As `Link.give_back`."""
        self._network.put_and_signal(
            stream, self._peer, to_offset=0, from_offset=0, num_bytes=0, word_offset=self._credit_offset
        )


def _fill_slot(signals: Signals, copy: CopyBatch, stream: int, slot: int, number: int, parts: Sequence[Part]) -> None:
    """Write the header, by value, and then the tensors of a message.

    In this order, so that a receiver finds another number in the header where a sender that gave up has gone on.
    """
    sizes = [part.num_bytes for part in parts]
    words = encode_header(number, sizes)
    signals.write_all(stream, [(slot + idx * WORD_BYTES, word) for idx, word in enumerate(words)])
    offsets = part_offsets(sizes)
    copy(stream, [Copy(slot + offset, *part) for offset, part in zip(offsets, parts, strict=True)])
