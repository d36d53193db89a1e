"""Owns where messages lie: the slots of a window, the parts of a slot, and the header at its beginning.

It allocates nothing and knows no address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deep_ep_core.align import align_up
from deep_ep_pp.checks import MAX_TENSORS
from deep_ep_pp.sizing import PipelineConfig, message_bytes

__all__ = [
    "HEADER_BYTES",
    "HEADER_WORDS",
    "WORD_BYTES",
    "Header",
    "SlotLayout",
    "decode_header",
    "encode_header",
    "part_offsets",
    "stamp_of",
]

WORD_BYTES = 8
HEADER_WORDS = MAX_TENSORS
"""Words of 64 bits of a header at most: one a tensor. The first also says which message it is, of how many tensors."""

HEADER_BYTES = 512
"""What a header takes of a slot: copies run best where tensors begin at a multiple of 512 bytes."""

_COUNT_BITS, _NUMBER_BITS = 6, 16
_FIRST_SIZE_SHIFT = _COUNT_BITS + _NUMBER_BITS
_COUNT_MASK, _NUMBER_MASK = (1 << _COUNT_BITS) - 1, (1 << _NUMBER_BITS) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a message says of itself.

    Attributes:
        stamp: The low bits of its number among those of its sender to its receiver: enough to tell it from any other
            that its slot may hold.
        sizes: Bytes of each of its tensors.
    """

    stamp: int
    sizes: list[int]


def stamp_of(number: int) -> int:
    """What a header says of the number of a message."""
    return number & _NUMBER_MASK


def encode_header(number: int, sizes: Sequence[int]) -> list[int]:
    """The words of a header, none of which is 0: one that is has not been written yet."""
    first = sizes[0] << _FIRST_SIZE_SHIFT | stamp_of(number) << _COUNT_BITS | len(sizes)
    return [first, *(size + 1 for size in sizes[1:])]


def decode_header(words: Sequence[int]) -> Header | None:
    """The header that words stand for, of which there may be more; None as long as a word is missing."""
    num_tensors = words[0] & _COUNT_MASK
    others = words[1:num_tensors]
    if num_tensors == 0 or not all(others):
        return None
    sizes = [words[0] >> _FIRST_SIZE_SHIFT, *(word - 1 for word in others)]
    return Header(stamp=words[0] >> _COUNT_BITS & _NUMBER_MASK, sizes=sizes)


def part_offsets(sizes: Sequence[int]) -> list[int]:
    """Where the tensors of a message begin, in bytes from the begin of its slot."""
    offsets, offset = [], HEADER_BYTES
    for size in sizes:
        offsets.append(offset)
        offset += message_bytes([size])
    return offsets


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLayout:
    """Where the slots of a window lie, the same on every rank: a window of slots for each sender, then a stage.

    Attributes:
        slot_bytes: Most bytes of a message.
        window: Slots for each peer.
        distances: How far the peers of a rank are ahead of it in the ring, ascending.
        has_stage: Whether there are as many slots again to send from, for peers that are reached by the network.
    """

    slot_bytes: int
    window: int
    distances: tuple[int, ...]
    has_stage: bool

    @classmethod
    def of(cls, config: PipelineConfig, *, rank: int, num_ranks: int, has_stage: bool) -> SlotLayout:
        """The layout of a configuration. Every rank has as many peers, as far away, so all come to the same one."""
        distances = sorted((peer - rank) % num_ranks for peer in config.peers)
        return cls(
            slot_bytes=config.slot_bytes,
            window=config.num_max_inflight_tensors,
            distances=tuple(distances),
            has_stage=has_stage,
        )

    @property
    def stride_bytes(self) -> int:
        """From one slot to the next."""
        return HEADER_BYTES + align_up(self.slot_bytes, HEADER_BYTES)

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return len(self.distances) * self.window * self.stride_bytes * (2 if self.has_stage else 1)

    def recv_offset(self, distance: int) -> int:
        """Where a receiver's slots for the sender begin that is so far ahead of it, in bytes."""
        return self.distances.index(distance) * self.window * self.stride_bytes

    def stage_offset(self, distance: int) -> int:
        """Where a sender's stage for the receiver begins that is so far ahead of it, in bytes."""
        assert self.has_stage, self
        return (len(self.distances) + self.distances.index(distance)) * self.window * self.stride_bytes

    def slot_offset(self, number: int) -> int:
        """Where the slot of a message begins, in bytes from the first one of its sender."""
        return (number - 1) % self.window * self.stride_bytes
