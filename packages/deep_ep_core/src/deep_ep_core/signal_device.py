"""Owns the driver's calls on signal words: in a caller's stream, and past all streams to read a word or to set one.

Who waits for what and how long is not known here: see `stream_signals` and `signal_watch`.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from deep_ep_core.errors import TransportError
from deep_ep_core.jit.driver import check_status, driver_call, load_driver

__all__ = ["SignalDevice"]

_WORD_BYTES = 8
_HOST_BYTES = 2 * _WORD_BYTES  # one word for reads, one for writes
_HIGHEST_PRIORITY = -(2**31)  # CUDA takes the nearest that it has
_COPY_TIMEOUT_S = 2.0
_COPY_POLL_S = 0.0005

# Pinned memory that no device uses at present. To free it, the driver would wait for all streams.
_spare_host_words: list[int] = []


class SignalDevice:
    """The words and events of one device, as the driver sees them. Its calls may come from several threads.

    Args:
        device: CUDA device.

    Raises:
        ConfigError: cuda-bindings is not installed.
        TransportError: The device has no memory operations of 64 bits in streams, or a call fails.
    """

    def __init__(self, device: torch.device) -> None:
        self._driver = driver = load_driver()
        device_idx = device.index if device.index is not None else torch.cuda.current_device()
        cu_device = driver_call("cuDeviceGet", device_idx)
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
        if not driver_call("cuDeviceGetAttribute", attribute, cu_device):
            raise TransportError(
                f"signals between streams need memory operations of 64 bits in streams (got a GPU or driver without "
                f"them, device {device_idx}); use a newer driver, or the collective backend",
                call="cuDeviceGetAttribute",
            )
        self._cu_device = cu_device
        self._context = driver_call("cuDevicePrimaryCtxRetain", cu_device)
        self._spare_events: list[Any] = []
        with self.current():
            flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
            # Streams share the queues of the hardware, and in the queue of a waiting stream a write would stand behind
            # the wait. A stream that never copied has a queue of kernels and waits; one that did, that of a copy
            # engine. So there are two for writes, of which the second one copies once, and one for copies.
            *self._write_streams, self._copy_stream = (
                driver_call("cuStreamCreateWithPriority", flags, _HIGHEST_PRIORITY) for _ in range(3)
            )
            try:
                self._host_words = _spare_host_words.pop()
            except IndexError:
                self._host_words = int(driver_call("cuMemHostAlloc", _HOST_BYTES, 0))
        self._copier: threading.Thread | None = None
        self._is_closed = False
        self._close_lock = threading.Lock()
        # Looked up once: these are called for every message.
        self._write_value = driver.cuStreamWriteValue64
        self._wait_value = driver.cuStreamWaitValue64
        self._record_event = driver.cuEventRecord
        self._query_event = driver.cuEventQuery
        self._is_capturing = driver.cuStreamIsCapturing
        self._not_captured = driver.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        self._success = driver.CUresult.CUDA_SUCCESS
        self._not_ready = driver.CUresult.CUDA_ERROR_NOT_READY

    # In a caller's stream

    def write(self, stream: int, address: int, value: int) -> None:
        """Enqueue a write. Whoever sees it sees what the stream wrote before, by the fence that the driver promises."""
        status = self._write_value(stream, address, value, 0)[0]
        if status:
            check_status(self._driver, "cuStreamWriteValue64", status)

    def wait(self, stream: int, address: int, least: int) -> None:
        """Enqueue a wait until a word is at least `least`, as the difference of two numbers of 64 bits tells."""
        status = self._wait_value(stream, address, least, 0)[0]
        if status:
            check_status(self._driver, "cuStreamWaitValue64", status)

    def record(self, stream: int) -> Any:
        """An event behind all that a stream has so far; `recycle` takes it back."""
        try:
            event = self._spare_events.pop()
        except IndexError:
            event = driver_call("cuEventCreate", self._driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value)
        status = self._record_event(event, stream)[0]
        if status:
            check_status(self._driver, "cuEventRecord", status)
        return event

    def is_captured(self, stream: int) -> bool:
        """Whether a graph captures the stream."""
        # The legacy default stream cannot be captured, and asking about it disturbs the capture of others.
        if not stream:
            return False
        status, capture = self._is_capturing(stream)
        if status:
            check_status(self._driver, "cuStreamIsCapturing", status)
        return bool(capture != self._not_captured)

    # Past all streams

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's primary context, which torch uses too, current in this thread while the block runs."""
        driver_call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            driver_call("cuCtxPopCurrent")

    @contextlib.contextmanager
    def captures_left_alone(self) -> Iterator[None]:
        """Let what this thread asks in the block not break captures of graphs that other threads have under way."""
        relaxed = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        mode = driver_call("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            driver_call("cuThreadExchangeStreamCaptureMode", mode)

    def is_done(self, event: Any) -> bool:
        """Whether the work in front of an event is done."""
        status = self._query_event(event)[0]
        if status == self._success:
            return True
        if status != self._not_ready:
            check_status(self._driver, "cuEventQuery", status)
        return False

    def recycle(self, event: Any) -> None:
        """Take back an event that nobody asks about any more."""
        self._spare_events.append(event)

    def prepare(self, address: int) -> None:
        """Make ready to read and write past waiting streams; before the first of them waits.

        Args:
            address: Any word that may be read.
        """
        for stream in (self._write_streams[1], self._copy_stream):
            driver_call("cuMemcpyDtoHAsync", self._host_words, address, _WORD_BYTES, stream)

    def read_now(self, addresses: Sequence[int]) -> list[int | None]:
        """Words as they are now; None where the driver does not read them within 2 s.

        A host thread in `cudaFree` holds all copies of the process up until the device is idle, which it never is while
        a stream waits for a rank that does not come; so this does not wait for it.
        """
        words: list[int | None] = [None] * len(addresses)
        if self._start_copier(self._read, addresses, words):
            assert self._copier is not None
            self._copier.join(_COPY_TIMEOUT_S)
        return list(words)

    def write_now(self, words: Mapping[int, int]) -> None:
        """Set words, by address, whatever streams wait for them, and whatever call another host thread is in.

        Returns before they are set. Where what was written at earlier calls is still held up, copies are tried.
        """
        query = self._driver.cuStreamQuery
        free_streams = [stream for stream in self._write_streams if query(stream)[0] != self._not_ready]
        for stream in free_streams:
            for address, value in words.items():
                self.write(stream, address, value)
        if not free_streams:
            self._start_copier(self._copy, dict(words))

    def _start_copier(self, function: Callable[..., None], *args: object) -> bool:
        """Run what copies in a thread of its own, since it may be held up; False if another one still is."""
        if self._copier is not None and self._copier.is_alive():
            return False
        self._copier = threading.Thread(target=self._run_copier, args=(function, *args), daemon=True)
        self._copier.start()
        return True

    def _run_copier(self, function: Callable[..., None], *args: object) -> None:
        # What cannot be copied is tried again or stays unknown.
        with contextlib.suppress(TransportError), self.current(), self.captures_left_alone():
            function(*args)

    def _read(self, addresses: Sequence[int], words: list[int | None]) -> None:
        word = ctypes.c_uint64.from_address(self._host_words)
        for idx, address in enumerate(addresses):
            driver_call("cuMemcpyDtoHAsync", self._host_words, address, _WORD_BYTES, self._copy_stream)
            if not self._is_copied():
                return
            words[idx] = word.value

    def _copy(self, words: Mapping[int, int]) -> None:
        host_address = self._host_words + _WORD_BYTES
        word = ctypes.c_uint64.from_address(host_address)
        for address, value in words.items():
            word.value = value
            driver_call("cuMemcpyHtoDAsync", address, host_address, _WORD_BYTES, self._copy_stream)
            if not self._is_copied():
                return

    def _is_copied(self) -> bool:
        give_up_at = time.monotonic() + _COPY_TIMEOUT_S
        while (status := self._driver.cuStreamQuery(self._copy_stream)[0]) == self._not_ready:
            if time.monotonic() > give_up_at:
                return False
            time.sleep(_COPY_POLL_S)
        check_status(self._driver, "cuStreamQuery", status)
        return True

    def close(self) -> None:
        """Give everything back. Never raises; may be repeated."""
        with self._close_lock:
            if self._is_closed:
                return
            self._is_closed = True
        if self._copier is not None:
            self._copier.join(2 * _COPY_TIMEOUT_S)
        events, self._spare_events = self._spare_events, []
        # What fails here was lost with the device.
        with contextlib.suppress(TransportError):
            with self.current():
                for event in events:
                    self._driver.cuEventDestroy(event)
                streams = (*self._write_streams, self._copy_stream)
                if all(self._driver.cuStreamQuery(stream)[0] == self._success for stream in streams):
                    _spare_host_words.append(self._host_words)
                for stream in streams:
                    self._driver.cuStreamDestroy(stream)
            driver_call("cuDevicePrimaryCtxRelease", self._cu_device)
