"""Owns what a heap must know of streams: which one is current, whether a graph captures it, events between them.

It does not decide when memory may be used again: `heap` does.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

import torch

__all__ = ["CudaStreamOrder", "HostOrder", "StreamOrder"]

_CAPTURE_MODE_RELAXED = 2


class StreamOrder(Protocol):
    """Streams of one device, named by integers."""

    def current(self) -> int:
        """The stream that the calling thread works on."""

    def capture_of(self, stream: int) -> int | None:
        """What capture a stream is part of: a number that no two captures share; None where it runs at once."""

    def record(self, stream: int) -> Any:
        """A new event behind all work that a stream has so far."""

    def is_done(self, event: Any) -> bool:
        """Whether the work in front of an event is done. Not for an event that was captured."""

    def wait(self, stream: int, event: Any) -> None:
        """Let a stream wait for an event; does not block the host."""


class HostOrder:
    """The order of a CPU: one stream, and everything is done when its call returns."""

    def current(self) -> int:
        """The only stream."""
        return 0

    def capture_of(self, stream: int) -> None:
        """None: nothing is captured."""

    def record(self, stream: int) -> None:
        """Nothing needs an event."""

    def is_done(self, event: None) -> bool:
        """Always."""
        return True

    def wait(self, stream: int, event: None) -> None:
        """Nothing to wait for."""


class CudaStreamOrder:
    """The streams of a CUDA device, named by their handles.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[int, torch.cuda.Stream] = {}

    def current(self) -> int:
        """Handle of the calling thread's current stream."""
        stream = torch.cuda.current_stream(self._device)
        self._streams.setdefault(stream.cuda_stream, stream)
        return stream.cuda_stream

    def capture_of(self, stream: int) -> int | None:
        """Id of the capture that a stream is part of, or None."""
        # The legacy default stream cannot be captured, and asking about it disturbs the capture of others.
        if stream == 0:
            return None
        status, capture_id = ctypes.c_int(), ctypes.c_uint64()
        code = _driver().cuStreamGetCaptureInfo_v2(
            stream, ctypes.byref(status), ctypes.byref(capture_id), None, None, None
        )
        if code != 0:
            raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUDA driver error {code}")
        return capture_id.value if status.value != 0 else None

    def record(self, stream: int) -> torch.cuda.Event:
        """A new event behind all work that a stream has so far."""
        event = torch.cuda.Event()
        event.record(self._stream(stream))
        return event

    def is_done(self, event: torch.cuda.Event) -> bool:
        """Whether the work in front of an event is done."""
        # Without this, a query would break a capture that any thread has under way.
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        try:
            return bool(event.query())
        finally:
            _driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def wait(self, stream: int, event: torch.cuda.Event) -> None:
        """Let a stream wait for an event; does not block the host."""
        event.wait(self._stream(stream))

    def _stream(self, handle: int) -> torch.cuda.Stream:
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = torch.cuda.ExternalStream(handle, self._device)
        return stream


@functools.cache
def _driver() -> Any:
    library = ctypes.CDLL("libcuda.so.1")
    # The first form with a stable name; graph and dependencies are not asked for.
    library.cuStreamGetCaptureInfo_v2.argtypes = (ctypes.c_void_p,) * 6
    library.cuThreadExchangeStreamCaptureMode.argtypes = (ctypes.c_void_p,)
    return library
