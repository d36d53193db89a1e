"""Who waits for whom where the kernels of one buffer are launched on several streams; nothing is launched here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deep_ep_core import cuda_streams
from deep_ep_legacy.device.context import DeviceContext


class Stream:
    """A stream that keeps what goes into it."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream, self.device_index = handle, 0
        self.capture: int | None = None
        self.work: list[Any] = []


class Event:
    """An event that knows how much work is in front of it."""

    def record(self, stream: Stream) -> None:
        self.point = stream.cuda_stream, len(stream.work)

    def wait(self, stream: Stream) -> None:
        stream.work.append(self.point)


class Context(DeviceContext):
    """Only what the order of launches needs."""

    def __init__(self, *streams: Stream) -> None:
        self._last = None
        self._streams = {stream.cuda_stream: stream for stream in streams}
        self._order = self  # type: ignore[assignment]

    def capture_of(self, handle: int) -> int | None:
        return self._streams[handle].capture

    def run(self, stream: Stream, name: str) -> None:
        self.follow(stream)  # type: ignore[arg-type]
        stream.work.append(name)
        self.launched(stream)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fake_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda_streams, "_spare_events", {})


def test_other_stream_waits_for_the_kernel_and_not_for_what_came_behind_it() -> None:
    one, two = Stream(1), Stream(2)
    context = Context(one, two)
    context.run(one, "first")
    one.work.append("work of the caller")
    context.run(two, "second")
    assert two.work == [(1, 1), "second"]


def test_stream_does_not_wait_for_itself() -> None:
    one = Stream(1)
    context = Context(one)
    context.run(one, "first")
    context.run(one, "second")
    assert one.work == ["first", "second"]


def test_streams_of_one_capture_wait_for_each_other() -> None:
    one, two = Stream(1), Stream(2)
    context = Context(one, two)
    one.capture = two.capture = 7
    context.run(one, "first")
    context.run(two, "second")
    assert two.work == [(1, 1), "second"]


@pytest.mark.parametrize(("before", "after"), [(7, None), (None, 7), (7, 8)])
def test_no_stream_waits_across_the_border_of_a_capture(before: int | None, after: int | None) -> None:
    """Of a finished capture too: the stream has left it, and its event stands for a node of a graph."""
    one, two = Stream(1), Stream(2)
    context = Context(one, two)
    one.capture = before
    context.run(one, "first")
    one.capture = two.capture = after
    context.run(two, "second")
    assert two.work == ["second"]
