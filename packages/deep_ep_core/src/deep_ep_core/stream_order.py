"""Owns what a heap must know of streams: which one is current, whether a graph captures it, events between them.

It does not decide when memory may be used again: `heap` does.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

import torch

from deep_ep_core.cuda_streams import RecordedEvent, current_stream

__all__ = ["CudaStreamOrder", "HostOrder", "StreamOrder"]

_CAPTURE_MODE_RELAXED = 2


class StreamOrder(Protocol):
    """Streams of one device, named by integers."""

    def current(self) -> int:
        """The stream that the calling thread works on."""

    def capture_of(self, stream: int) -> int | None:
        """What capture a stream is part of: a number that no two captures share; None where it runs at once."""

    def record(self, stream: int) -> Any:
        """An event behind all work that a stream has so far. It stays as it is while it is referred to."""

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
        self._device_idx = device.index if device.index is not None else torch.cuda.current_device()
        self._streams: dict[int, torch.cuda.Stream] = {}

    def current(self) -> int:
        """Handle of the calling thread's current stream."""
        stream = current_stream(self._device_idx)
        handle = stream.cuda_stream
        self._streams[handle] = stream
        return handle

    def capture_of(self, stream: int) -> int | None:
        """Id of the capture that a stream is part of, or None."""
        # The legacy default stream cannot be captured, and asking about it disturbs the capture of others.
        if stream == 0:
            return None
        # Most often there is no capture, and its id need not be asked for.
        status = ctypes.c_int()
        _get_capture_info(stream, ctypes.byref(status), None)
        if not status.value:
            return None
        capture_id = ctypes.c_uint64()
        _get_capture_info(stream, ctypes.byref(status), ctypes.byref(capture_id))
        return capture_id.value if status.value else None

    def record(self, stream: int) -> RecordedEvent:
        """An event behind all work that a stream has so far. It stays as it is while it is referred to."""
        return RecordedEvent(self._stream(stream))

    def is_done(self, event: RecordedEvent) -> bool:
        """Whether the work in front of an event is done."""
        # Without this, a query would break a capture that any thread has under way.
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        exchange_mode, mode_pointer = _driver().cuThreadExchangeStreamCaptureMode, ctypes.byref(mode)
        exchange_mode(mode_pointer)
        try:
            return event.is_done()
        finally:
            exchange_mode(mode_pointer)

    def wait(self, stream: int, event: RecordedEvent) -> None:
        """Let a stream wait for an event; does not block the host."""
        event.wait_on(self._stream(stream))

    def _stream(self, handle: int) -> torch.cuda.Stream:
        stream = self._streams.get(handle)
        if stream is None:
            # Torch takes the handle 0 for none, and would give a stream of its pool.
            device = self._device
            stream = torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)
            self._streams[handle] = stream
        return stream


def _get_capture_info(stream: int, status: Any, capture_id: Any) -> None:
    code = _driver().cuStreamGetCaptureInfo_v2(stream, status, capture_id, None, None, None)
    if code != 0:
        raise RuntimeError(f"cuStreamGetCaptureInfo failed with CUDA driver error {code}")


@functools.cache
def _driver() -> Any:
    # Calls that return at once, for which to let the interpreter's lock go and take it again would cost more than they.
    library = ctypes.PyDLL("libcuda.so.1")
    # The first form with a stable name; graph and dependencies are not asked for.
    library.cuStreamGetCaptureInfo_v2.argtypes = (ctypes.c_void_p,) * 6
    library.cuThreadExchangeStreamCaptureMode.argtypes = (ctypes.c_void_p,)
    return library
