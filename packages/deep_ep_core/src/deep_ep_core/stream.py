"""Owns streams and events: a device's communication stream, `EventHandle`, `EventOverlap`, an operation's stream scope.

It does not own tensors' memory, and knows nothing of what an operation moves. On a CPU every operation is complete
when it returns, so streams and events carry no work there; the same calls are valid and wait for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from deep_ep_core.cuda_streams import RecordedEvent, current_stream
from deep_ep_core.env import get_env
from deep_ep_core.errors import ConfigError

__all__ = ["CommScope", "EventHandle", "EventOverlap", "NoEventError", "StreamOptions", "comm_stream"]


class NoEventError(ConfigError, AssertionError):
    """`EventOverlap` was asked to wait, but holds no event: the operation was not asynchronous.

    Also an AssertionError, which is what existing callers catch.
    """


def _default_device() -> torch.device:
    """The device whose current stream a bare `EventHandle()` records on."""
    if torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _idx_of(device: torch.device) -> int:
    """Index of a CUDA device; that of the current one where none is given."""
    return device.index if device.index is not None else torch.cuda.current_device()


class EventHandle:
    """A point in a stream that other streams can wait for.

    Args:
        device: Device whose current stream is recorded; None takes the current CUDA device, or the CPU where CUDA is
            not in use.
        stream: CUDA stream to record on instead of the current one.
        kept_tensors: Tensors to keep alive as long as this handle lives.

    Stream: records on the current stream of `device`, or on `stream`. Collective: no.
    """

    __slots__ = ("_event", "_kept_tensors", "device")

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        stream: torch.cuda.Stream | None = None,
        kept_tensors: Iterable[torch.Tensor] = (),
    ) -> None:
        self.device = _default_device() if device is None else torch.device(device)
        self._kept_tensors = tuple(kept_tensors)
        self._event: RecordedEvent | None = None
        if self.device.type == "cuda":
            self._event = RecordedEvent(stream if stream is not None else current_stream(_idx_of(self.device)))

    def current_stream_wait(self) -> None:
        """Make the current stream of the event's device wait for the event. Does not block the host."""
        self.wait_on(None)

    def wait_on(self, stream: torch.cuda.Stream | None) -> None:
        """Make `stream` (None: the current one) wait for the event. Does not block the host."""
        if self._event is not None:
            self._event.wait_on(stream if stream is not None else current_stream(_idx_of(self.device)))

    def __repr__(self) -> str:
        return f"EventHandle(device={self.device}, kept_tensors={len(self._kept_tensors)})"


class EventOverlap:
    """What an operation returns so that its caller can overlap work with it and wait for it later.

    Args:
        event: The event of an asynchronous operation; None when the operation was not asynchronous.
        extra_tensors: Tensors kept alive as long as this object lives.

    As a context manager it waits when the block ends, if it holds an event:

        with event_overlap:
            other_work()
        # here the current stream has waited
    """

    def __init__(self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], Any] | None = None
        self._release_on_exit = False

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the event, then run and clear the hook, if one is registered.

        Args:
            release_handle: Also drop the event afterwards, and with it every tensor that it keeps alive.

        Raises:
            NoEventError: The operation was not asynchronous, so there is no event.
        """
        if self.event is None:
            raise NoEventError(
                "current_stream_wait needs an event, but this EventOverlap holds none: the operation was called "
                "without async_with_compute_stream=True (its results are ready for the current stream already), "
                "or the event was released"
            )
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook: Callable[[], Any]) -> None:
        """Run `hook` once, after the next wait.

        Raises:
            ConfigError: A hook is pending already.
        """
        if self.hook_after_wait is not None:
            raise ConfigError("at most one hook can be pending on an EventOverlap; wait for it before adding another")
        self.hook_after_wait = hook

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Set whether the next `with` block releases the event when it ends; returns self."""
        self._release_on_exit = release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        release, self._release_on_exit = self._release_on_exit, False
        if self.event is not None:
            self.current_stream_wait(release)

    def __repr__(self) -> str:
        return f"EventOverlap(event={self.event!r})"


_comm_streams: dict[int, torch.cuda.Stream] = {}
_comm_streams_lock = threading.Lock()


def comm_stream(device: torch.device) -> torch.cuda.Stream | torch.cpu.Stream:
    """The communication stream of a device: one per process and device, of high priority.

    Args:
        device: A CUDA device, or the CPU, whose stream object carries no work.

    Returns:
        The same stream for the same device, always.
    """
    if device.type != "cuda":
        return torch.cpu.current_stream()
    device_idx = _idx_of(device)
    stream = _comm_streams.get(device_idx)
    if stream is None:
        with _comm_streams_lock:
            if device_idx not in _comm_streams:
                _comm_streams[device_idx] = torch.cuda.Stream(device_idx, priority=-1)
            stream = _comm_streams[device_idx]
    return stream


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """How one operation sits in the caller's streams.

    Attributes:
        previous_event: The communication stream waits for this instead of for the current stream's present tail.
        previous_event_before_epilogue: The communication stream waits for this before the operation's last step.
        async_with_compute_stream: Return an event instead of making the current stream wait.
        allocate_on_comm_stream: What callers asked for; `CommScope` takes memory from the communication stream's pool
            in either case.

    Raises:
        NoEventError: An event to wait for is an empty `EventOverlap`.
    """

    previous_event: EventHandle | EventOverlap | None = None
    previous_event_before_epilogue: EventHandle | EventOverlap | None = None
    async_with_compute_stream: bool = False
    allocate_on_comm_stream: bool = False

    def __post_init__(self) -> None:
        # Here, and not where a stream would wait: that is too late, and never happens on a CPU.
        for name in ("previous_event", "previous_event_before_epilogue"):
            event = getattr(self, name)
            if isinstance(event, EventOverlap) and event.event is None:
                raise NoEventError(
                    f"{name} must hold an event (got an empty EventOverlap: the call that returned it was not "
                    "asynchronous, or its event was released); pass None, or an EventHandle"
                )


class CommScope:
    """Runs one operation on the communication stream and restores the caller's stream and device in every case.

    Inside the `with` block the communication stream is current. It has waited for `previous_event`, or for the
    caller's stream where none is given. `finish` ends the operation: it returns an event, or makes the caller's stream
    wait. Tensors that cross the two streams are recorded on the one that they do not come from, or kept alive by the
    event (`EP_AVOID_RECORD_STREAM`).

    An operation that returns nothing to wait for, and starts where the caller's stream stands, gains nothing from a
    stream of its own: with `may_stay` it runs on the caller's stream, which spares the host a good part of its work.

    Torch records no stream for memory that it did not allocate. Who makes or uses tensors of a heap in the block tells
    the heap himself: `compute_stream` uses what is returned, `comm_stream` what was passed in.

    Args:
        device: Device of the operation.
        options: How the operation sits in the caller's streams.
        may_stay: Whether the operation may run on the caller's stream where that makes no difference.

    Attributes:
        compute_stream: The caller's stream, in the block; None before it, and on a CPU.
        comm_stream: The stream that the operation runs on, in the same way: the communication stream or, where the
            operation stays, the caller's.

    Raises:
        ConfigError: The communication stream is already current, so there is nothing to overlap with.
    """

    __slots__ = ("_device", "_device_idx_before", "_options", "_stays", "comm_stream", "compute_stream")

    def __init__(self, device: torch.device, options: StreamOptions, *, may_stay: bool = False) -> None:
        self._device = device
        self._options = options
        self._stays = may_stay and not options.async_with_compute_stream and options.previous_event is None
        self.compute_stream: torch.cuda.Stream | None = None
        self.comm_stream: torch.cuda.Stream | None = None
        self._device_idx_before = 0

    @property
    def stream_handle(self) -> int:
        """Handle of `comm_stream`, in the block; 0 on a CPU."""
        stream = self.comm_stream
        return 0 if stream is None else stream.cuda_stream

    @property
    def is_crossed(self) -> bool:
        """Whether tensors cross two streams in this block. Where they do not, `finish` needs none."""
        return self.compute_stream is not self.comm_stream

    def __enter__(self) -> CommScope:
        if self._device.type != "cuda":
            return self
        compute = current_stream(_idx_of(self._device))
        if self._stays:
            self.compute_stream = self.comm_stream = compute
            return self
        comm = comm_stream(self._device)
        assert isinstance(comm, torch.cuda.Stream)
        if compute == comm:
            raise ConfigError(
                "a communication call must come from a stream of its own, but the communication stream is current; "
                "leave the `torch.cuda.stream(buffer.get_comm_stream())` block before calling"
            )
        if self._options.previous_event is not None:
            _wait(comm, self._options.previous_event)
        else:
            RecordedEvent(compute).wait_on(comm)
        # Also makes the stream's device current, where another one was. `torch.cuda.stream` takes longer than all else
        # in this block.
        self._device_idx_before = torch.cuda.current_device()
        torch.cuda.set_stream(comm)
        self.compute_stream, self.comm_stream = compute, comm
        return self

    def wait_before_epilogue(self) -> None:
        """Make the communication stream wait for `previous_event_before_epilogue`, if there is one."""
        if self.comm_stream is not None and self._options.previous_event_before_epilogue is not None:
            _wait(self.comm_stream, self._options.previous_event_before_epilogue)

    def finish(
        self, inputs: Iterable[torch.Tensor | None] = (), outputs: Iterable[torch.Tensor | None] = ()
    ) -> EventOverlap:
        """End the operation. None entries are skipped; a tensor that is both is given as both.

        Args:
            inputs: Every tensor from outside that the operation uses.
            outputs: Every tensor that was made in the block and leaves it.

        Returns:
            An `EventOverlap` that holds an event if the operation is asynchronous, else an empty one.
        """
        is_async = self._options.async_with_compute_stream
        if self.comm_stream is None or self.compute_stream is None:
            return EventOverlap(EventHandle(self._device)) if is_async else EventOverlap(None)
        if self._stays:
            return EventOverlap(None)
        if is_async and get_env().avoid_record_stream:
            kept = [tensor for tensor in (*inputs, *outputs) if tensor is not None]
            return EventOverlap(EventHandle(self._device, stream=self.comm_stream, kept_tensors=kept))
        # Also for a synchronous call: a tensor may be freed while the stream that it does not come from still uses it.
        for tensors, stream in ((inputs, self.comm_stream), (outputs, self.compute_stream)):
            for tensor in tensors:
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)
        if is_async:
            return EventOverlap(EventHandle(self._device, stream=self.comm_stream))
        RecordedEvent(self.comm_stream).wait_on(self.compute_stream)
        return EventOverlap(None)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.compute_stream is None:
            return
        if self._stays:
            self.compute_stream = self.comm_stream = None
            return
        device_idx = self.compute_stream.device_index
        torch.cuda.set_stream(self.compute_stream)
        self.compute_stream = self.comm_stream = None
        if self._device_idx_before != device_idx:
            torch.cuda.set_device(self._device_idx_before)


def _wait(stream: torch.cuda.Stream, event: EventHandle | EventOverlap) -> None:
    handle = event.event if isinstance(event, EventOverlap) else event
    assert handle is not None, "StreamOptions takes no empty EventOverlap"
    handle.wait_on(stream)
