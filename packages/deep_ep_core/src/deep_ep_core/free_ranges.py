"""Owns the free parts of an address range: which there are, the best one for a request, and joining neighbours.

Each part carries the fences behind which it is free. What a fence is, and who may pass it, belongs to `heap`.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["Fence", "FreeRange", "FreeRanges"]


class Fence(NamedTuple):
    """The end of a stream's use of some memory.

    Attributes:
        number: Counts up; of two fences of one stream, the higher is the later one.
        event: The event, as the stream order recorded it.
    """

    number: int
    event: Any


@dataclass(slots=True, kw_only=True)
class FreeRange:
    """A free part of the address range.

    Attributes:
        offset: Where it begins, in bytes.
        num_bytes: Its size.
        capture: The capture whose graph uses it at every replay; None for memory that anyone may have.
        fences: By stream, the end of its use of this memory.
    """

    offset: int
    num_bytes: int
    capture: int | None = None
    fences: dict[int, Fence] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """First byte behind it."""
        return self.offset + self.num_bytes


class FreeRanges:
    """The free parts of the bytes from 0 to `num_bytes`, at first all of them.

    Neighbours are joined unless they belong to different captures.
    """

    def __init__(self, num_bytes: int) -> None:
        self._ranges = [FreeRange(offset=0, num_bytes=num_bytes)] if num_bytes else []

    def __iter__(self) -> Iterator[FreeRange]:
        return iter(self._ranges)

    def take(self, num_bytes: int, cost_of: Callable[[FreeRange], int | None]) -> FreeRange | None:
        """Take bytes out of the cheapest range that holds them; among equals the smallest, then the first.

        Args:
            num_bytes: How many, at least 1.
            cost_of: What a range costs; None for one that must not be used.

        Returns:
            A range of exactly that size, with the fences of the one that it was cut from; None if there is none.
        """
        best: tuple[int, int, int] | None = None
        for idx, candidate in enumerate(self._ranges):
            if candidate.num_bytes >= num_bytes:
                cost = cost_of(candidate)
                if cost is not None and (best is None or (cost, candidate.num_bytes) < best[:2]):
                    best = (cost, candidate.num_bytes, idx)
        if best is None:
            return None
        idx = best[2]
        found = self._ranges[idx]
        if found.num_bytes == num_bytes:
            del self._ranges[idx]
            return found
        taken = FreeRange(offset=found.offset, num_bytes=num_bytes, capture=found.capture, fences=dict(found.fences))
        found.offset += num_bytes
        found.num_bytes -= num_bytes
        return taken

    def put(self, given: FreeRange) -> None:
        """Add a range, which must not overlap a free one, and join it with its neighbours."""
        idx = bisect.bisect(self._ranges, given.offset, key=lambda free: free.offset)
        before = self._ranges[idx - 1] if idx > 0 else None
        after = self._ranges[idx] if idx < len(self._ranges) else None
        assert before is None or before.end <= given.offset, (before, given)
        assert after is None or given.end <= after.offset, (given, after)
        if after is not None and after.offset == given.end and after.capture == given.capture:
            given.num_bytes += after.num_bytes
            _merge_fences(given.fences, after.fences)
            del self._ranges[idx]
        if before is not None and before.end == given.offset and before.capture == given.capture:
            before.num_bytes += given.num_bytes
            _merge_fences(before.fences, given.fences)
        else:
            self._ranges.insert(idx, given)


def _merge_fences(into: dict[int, Fence], others: Mapping[int, Fence]) -> None:
    for stream, fence in others.items():
        own = into.get(stream)
        if own is None or own.number < fence.number:
            into[stream] = fence
