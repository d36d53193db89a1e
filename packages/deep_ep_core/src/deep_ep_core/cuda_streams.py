"""Owns quick ways to what torch has of CUDA streams: the current one of a thread, and events that are used again.

Torch's own ways take 3 us each on the host, a good part of what a whole operation may take. Who waits for whom is
decided elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

__all__ = ["RecordedEvent", "current_stream"]

# By device and handle. A handle that its owner destroys and CUDA gives to a new stream stands for that one then.
_streams: dict[tuple[int, int], torch.cuda.Stream] = {}
_spare_events: dict[int, list[torch.cuda.Event]] = {}


def current_stream(device_idx: int) -> torch.cuda.Stream:
    """The calling thread's current stream of a device, as `torch.cuda.current_stream` gives it."""
    key = device_idx, _handle_of_current()(device_idx)
    stream = _streams.get(key)
    if stream is None:
        stream = _streams[key] = torch.cuda.current_stream(device_idx)
    return stream


class RecordedEvent:
    """A point in a CUDA stream: behind all work that the stream has when this object is made.

    Its CUDA event is used again once this object is gone; to make and destroy one takes the host longer than to record
    it. A stream that was made to wait still waits for what the event stood for then.

    Args:
        stream: The stream.
    """

    __slots__ = ("_event", "_pool")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._pool = _spare_events.setdefault(stream.device_index, [])
        try:
            self._event = self._pool.pop()
        except IndexError:
            self._event = torch.cuda.Event()
        self._event.record(stream)

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Make a stream wait for this point. Does not block the host."""
        self._event.wait(stream)

    def is_done(self) -> bool:
        """Whether the work in front of this point is done. Not for a point in a stream that was being captured."""
        return bool(self._event.query())

    def __del__(self) -> None:
        # In any thread, and between any two steps of it, so this is one step that cannot fail.
        self._pool.append(self._event)


@functools.cache
def _handle_of_current() -> Callable[[int], int]:
    """Torch's short way to the handle of a device's current stream, which Triton takes as well; else the long one."""
    short_way: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return short_way or (lambda device_idx: int(torch.cuda.current_stream(device_idx).cuda_stream))
