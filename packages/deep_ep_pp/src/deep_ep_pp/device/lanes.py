"""Owns the protocol between two ranks: what a send and a receive wait for, and in which order words and data follow.

    sender                                          receiver
    wait: credit >= number - window                 wait: arrival >= number
    header, tensors -> slot of the receiver         slot -> tensors; header -> host memory
    arrival = number                                credit = number, in the sender's window

Both words are counts that only grow. The receiver has the arrivals of each sender in its own window, the sender the
credits of each receiver in its own: every wait is on memory of the rank that waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deep_ep_core.copy_engine import Copy
from deep_ep_pp.device.layout import HEADER_WORDS, WORD_BYTES, SlotLayout, part_offsets
from deep_ep_pp.device.links import CopyBatch, Link, Part, Signals
from deep_ep_pp.device.receipts import Receipt

__all__ = ["Lane"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """Both directions between this rank and a peer, for one configuration.

    Attributes:
        peer: The rank.
        signals: Waits for words.
        copy: Copies.
        layout: Where slots lie.
        link: The way to the peer.
        slots_address: This rank's slots for the peer's messages.
        arrival_address: This rank's word for messages of the peer that have arrived.
        credit_address: This rank's word for messages to the peer that were taken.
        num_sent_before: Messages to the peer before this configuration; all were taken.
    """

    peer: int
    signals: Signals
    copy: CopyBatch
    layout: SlotLayout
    link: Link
    slots_address: int
    arrival_address: int
    credit_address: int
    num_sent_before: int

    def send(self, stream: int, number: int, parts: Sequence[Part], *, operation: str) -> None:
        """Enqueue the send of a message.

        Args:
            stream: Handle of the stream.
            number: Number of the message.
            parts: Its tensors.
            operation: What a timeout is called.
        """
        num_taken = number - self.layout.window
        # The first window of messages has nothing to wait for.
        if num_taken > self.num_sent_before:
            self.signals.wait(stream, self.credit_address, num_taken, peer=self.peer, phase=operation)
        self.link.deliver(stream, number, parts)

    def recv(self, stream: int, parts: Sequence[Part], receipt: Receipt) -> None:
        """Enqueue the receive of a message.

        Args:
            stream: Handle of the stream.
            parts: Where its tensors go.
            receipt: Where its header goes, for the host.
        """
        number = receipt.number
        self.signals.wait(stream, self.arrival_address, number, peer=self.peer, phase=receipt.operation)
        slot = self.slots_address + self.layout.slot_offset(number)
        offsets = part_offsets([part.num_bytes for part in parts])
        self.copy(
            stream,
            [Copy(part.address, slot + offset, part.num_bytes) for offset, part in zip(offsets, parts, strict=True)],
        )
        # Behind the tensors: what a sender that gave up has written over them is told by the number.
        self.copy(stream, [Copy(receipt.address, slot, HEADER_WORDS * WORD_BYTES)])
        self.link.give_back(stream, number)

    def wait_until_taken(self, stream: int, number: int, *, operation: str) -> None:
        """Let a stream wait until the peer has taken the messages up to a number."""
        if number > self.num_sent_before:
            self.signals.wait(stream, self.credit_address, number, peer=self.peer, phase=operation)
