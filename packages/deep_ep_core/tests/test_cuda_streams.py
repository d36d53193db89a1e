"""The current stream and events that are used again: with a stand-in for torch's events, and on a GPU."""

from __future__ import annotations

import threading
from typing import ClassVar

import pytest
import torch

from deep_ep_core import cuda_streams
from deep_ep_core.cuda_streams import RecordedEvent, current_stream

SLEEP_CYCLES = 200_000_000


class FakeStream:
    def __init__(self, device_index: int = 0) -> None:
        self.device_index = device_index


class FakeEvent:
    """Counts how many there are, and keeps where each was recorded."""

    made: ClassVar[list[FakeEvent]] = []

    def __init__(self) -> None:
        self.made.append(self)
        self.recorded_on: list[FakeStream] = []

    def record(self, stream: FakeStream) -> None:
        self.recorded_on.append(stream)


@pytest.fixture
def made(monkeypatch):
    """The events that were made."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "made", [])
    monkeypatch.setattr(cuda_streams, "_spare_events", {})
    return FakeEvent.made


def test_an_event_is_used_again_when_its_last_reference_is_gone(made):
    first, second = FakeStream(), FakeStream()
    event = RecordedEvent(first)
    other_reference = event
    del event
    kept = RecordedEvent(second)
    assert [one.recorded_on for one in made] == [[first], [second]]
    del other_reference
    _another = RecordedEvent(second)
    assert [one.recorded_on for one in made] == [[first, second], [second]]
    del kept


def test_events_of_two_devices_are_kept_apart(made):
    RecordedEvent(FakeStream(0))
    RecordedEvent(FakeStream(1))
    assert len(made) == 2


def test_threads_never_share_an_event(made):
    wrong = []

    def work() -> None:
        mine = FakeStream()
        for _ in range(500):
            event = RecordedEvent(mine)
            if event._event.recorded_on[-1] is not mine:
                wrong.append(event)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.gpu
def test_the_current_stream_is_the_one_that_torch_says():
    side = torch.cuda.Stream()
    device_idx = torch.cuda.current_device()
    seen = []
    for _ in range(2):
        assert current_stream(device_idx) == torch.cuda.current_stream()
        with torch.cuda.stream(side):
            assert current_stream(device_idx) == side
            thread = threading.Thread(target=lambda: seen.append(current_stream(device_idx)))
            thread.start()
            thread.join()
    assert seen == [torch.cuda.default_stream()] * 2


@pytest.mark.gpu
def test_who_was_made_to_wait_still_waits_after_the_event_is_used_again():
    first, second, third = (torch.cuda.Stream() for _ in range(3))
    tensor = torch.zeros(1024, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(first):
        torch.cuda._sleep(SLEEP_CYCLES)
        tensor.fill_(1)
    RecordedEvent(first).wait_on(second)
    for _ in range(3):
        RecordedEvent(third)
    with torch.cuda.stream(second):
        copy = tensor.clone()
    second.synchronize()
    assert copy.min().item() == 1


@pytest.mark.gpu
def test_an_event_that_was_part_of_a_graph_is_used_again_outside_of_it():
    side, forked = torch.cuda.Stream(), torch.cuda.Stream()
    tensor = torch.zeros(1024, device="cuda")
    torch.cuda.synchronize()
    cuda_streams._spare_events.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        RecordedEvent(side).wait_on(forked)
        with torch.cuda.stream(forked):
            tensor.add_(1)
        RecordedEvent(forked).wait_on(side)
    graph.replay()
    event = RecordedEvent(side)
    torch.cuda.synchronize()
    assert event.is_done()
    graph.replay()
    torch.cuda.synchronize()
    assert tensor.unique().tolist() == [2]
