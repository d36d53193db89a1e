"""A stand-in for `cuda.bindings.driver`: streams that run by themselves as far as they can, over words in a dict."""

from __future__ import annotations

import ctypes
import enum
import itertools
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

_SIGN_BIT = 2**63


class Status(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_NOT_READY = 600


class FakeEvent:
    def __init__(self) -> None:
        self.is_done = True


Step = Callable[[], bool]  # tries, and says whether the stream may go on


class FakeDriver:
    """The calls of signals and copies. Streams are numbers; those that no caller has begin at `FIRST_PRIVATE`."""

    CUresult = Status
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS="words")
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=SimpleNamespace(value=1))
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=SimpleNamespace(value=2))
    CUstreamCaptureStatus = SimpleNamespace(CU_STREAM_CAPTURE_STATUS_NONE=0)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    CUmemcpySrcAccessOrder = SimpleNamespace(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM="stream order")
    CUmemcpyFlags = SimpleNamespace(CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE=SimpleNamespace(value=1))
    CUmemcpyAttributes = SimpleNamespace
    CUdeviceptr = int
    FIRST_PRIVATE = 99

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.copies: list[tuple[Any, ...]] = []
        self.captured: set[int] = set()
        self.num_events = 0
        self.num_released = 0
        self.copies_may_start = threading.Event()
        self.copies_may_start.set()
        self._private_streams = itertools.count(self.FIRST_PRIVATE)
        self.has_words = True
        self.version = 13000
        self.query_status = Status.CUDA_SUCCESS
        self._steps: dict[int, deque[Step]] = {}
        self._host_words = (ctypes.c_uint64 * 2)()
        self._lock = threading.RLock()

    # What tests do

    def busy(self, stream: int) -> threading.Event:
        """Let a stream work until the event is set."""
        over = threading.Event()
        self._enqueue(stream, over.is_set)
        return over

    def hold_up_private(self, idx: int) -> None:
        """Let one of the private streams stand behind a wait of another one for ever."""
        self._enqueue(self.FIRST_PRIVATE + idx, lambda: False)

    def peer_writes(self, address: int, value: int) -> None:
        with self._lock:
            self.words[address] = value
            self._run()

    def is_idle(self, stream: int) -> bool:
        with self._lock:
            self._run()
            return not self._steps.get(stream)

    # The driver

    def cuStreamWriteValue64(self, stream: int, address: int, value: int, flags: int) -> tuple[Status]:  # noqa: N802
        assert flags == 0
        self._enqueue(stream, lambda: self.words.__setitem__(address, value) is None)
        return (Status.CUDA_SUCCESS,)

    def cuStreamWaitValue64(self, stream: int, address: int, least: int, flags: int) -> tuple[Status]:  # noqa: N802
        assert flags == 0
        self._enqueue(stream, lambda: not ((self.words.get(address, 0) - least) % 2**64) & _SIGN_BIT)
        return (Status.CUDA_SUCCESS,)

    def cuEventCreate(self, flags: int) -> tuple[Status, FakeEvent]:  # noqa: N802
        assert flags == 2
        self.num_events += 1
        return Status.CUDA_SUCCESS, FakeEvent()

    def cuEventRecord(self, event: FakeEvent, stream: int) -> tuple[Status]:  # noqa: N802
        event.is_done = False
        self._enqueue(stream, lambda: setattr(event, "is_done", True) is None)
        return (Status.CUDA_SUCCESS,)

    def cuEventQuery(self, event: FakeEvent) -> tuple[Status]:  # noqa: N802
        if self.query_status:
            return (self.query_status,)
        with self._lock:
            self._run()
            return (Status.CUDA_SUCCESS if event.is_done else Status.CUDA_ERROR_NOT_READY,)

    def cuMemcpyDtoHAsync(self, host: int, address: int, num_bytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        assert (host, num_bytes) == (ctypes.addressof(self._host_words), 8)
        assert stream >= self.FIRST_PRIVATE
        self.copies_may_start.wait()
        self._host_words[0] = self.words.get(address, 0)
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, address: int, host: int, num_bytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        assert (host, num_bytes) == (ctypes.addressof(self._host_words) + 8, 8)
        assert stream >= self.FIRST_PRIVATE
        self.copies_may_start.wait()
        self.peer_writes(address, self._host_words[1])
        return (Status.CUDA_SUCCESS,)

    def cuStreamQuery(self, stream: int) -> tuple[Status]:  # noqa: N802
        return (Status.CUDA_SUCCESS if self.is_idle(stream) else Status.CUDA_ERROR_NOT_READY,)

    def cuMemcpyAsync(self, dst: int, src: int, num_bytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        self.copies.append(("single", stream, dst, src, num_bytes))
        return (Status.CUDA_SUCCESS,)

    def cuMemcpyBatchAsync(self, *args: Any) -> tuple[Status]:  # noqa: N802
        self.copies.append(("batch", *args))
        return (Status.CUDA_SUCCESS,)

    def cuStreamIsCapturing(self, stream: int) -> tuple[Status, int]:  # noqa: N802
        assert stream != 0, "asking about the legacy default stream disturbs captures"
        return Status.CUDA_SUCCESS, int(stream in self.captured)

    def cuDeviceGetAttribute(self, attribute: str, device: str) -> tuple[Status, int]:  # noqa: N802
        assert (attribute, device) == ("words", "device")
        return Status.CUDA_SUCCESS, int(self.has_words)

    def cuStreamCreateWithPriority(self, flags: int, priority: int) -> tuple[Status, int]:  # noqa: N802
        assert flags == 1
        return Status.CUDA_SUCCESS, next(self._private_streams)

    def cuMemHostAlloc(self, num_bytes: int, flags: int) -> tuple[Status, int]:  # noqa: N802
        assert (num_bytes, flags) == (16, 0)
        return Status.CUDA_SUCCESS, ctypes.addressof(self._host_words)

    def cuDriverGetVersion(self) -> tuple[Status, int]:  # noqa: N802
        return Status.CUDA_SUCCESS, self.version

    def cuDevicePrimaryCtxRelease(self, device: str) -> tuple[Status]:  # noqa: N802
        self.num_released += 1
        return (Status.CUDA_SUCCESS,)

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, tuple[Any, ...]] = {
            "cuInit": (),
            "cuDeviceGet": ("device",),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuCtxPushCurrent": (),
            "cuCtxPopCurrent": ("context",),
            "cuThreadExchangeStreamCaptureMode": ("global",),
            "cuGetErrorString": (b"no reason given",),
            "cuEventDestroy": (),
            "cuStreamDestroy": (),
        }
        if name not in answers:
            raise AttributeError(name)
        return lambda *args: (Status.CUDA_SUCCESS, *answers[name])

    def _enqueue(self, stream: int, step: Step) -> None:
        with self._lock:
            self._steps.setdefault(stream, deque()).append(step)
            self._run()

    def _run(self) -> None:
        """Let every stream go as far as it can, until nothing moves any more."""
        has_moved = True
        while has_moved:
            has_moved = False
            for steps in list(self._steps.values()):
                while steps and steps[0]():
                    steps.popleft()
                    has_moved = True
