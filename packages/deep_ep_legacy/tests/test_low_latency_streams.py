"""On which stream a low-latency call runs, in a capture and outside of it; there is no GPU here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deep_ep_core.stream import EventOverlap, StreamOptions
from deep_ep_legacy import low_latency
from deep_ep_legacy.low_latency import LowLatencySession
from deep_ep_legacy.low_latency_pending import PendingCalls


class Event:
    def __init__(self, device: torch.device) -> None:
        self.device = device


class Scope:
    """Keeps how it was made; an event of its own stands for the communication stream."""

    made: Scope

    def __init__(self, device: torch.device, options: StreamOptions, *, may_stay: bool) -> None:
        Scope.made = self
        self.stays = may_stay and not options.async_with_compute_stream
        self.event = EventOverlap(None if self.stays else Event(device))  # type: ignore[arg-type]

    def __enter__(self) -> Scope:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def finish(self, inputs: object, outputs: object) -> EventOverlap:
        return self.event


class Call:
    inputs = outputs = ()

    def complete(self) -> None:
        pass


def run(monkeypatch: pytest.MonkeyPatch, *, async_finish: bool, is_capturing: bool) -> EventOverlap:
    monkeypatch.setattr(low_latency, "CommScope", Scope)
    monkeypatch.setattr(low_latency, "EventHandle", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    session: Any = LowLatencySession.__new__(LowLatencySession)
    session._pending, session._half = PendingCalls(2), 0
    return session._run(Call, Call(), torch.device("cuda", 0), async_finish, False)[1]


def test_call_in_a_capture_stays_and_has_an_event_all_the_same(monkeypatch) -> None:
    """Torch gives memory that two streams used to nobody before the capture ends."""
    event = run(monkeypatch, async_finish=True, is_capturing=True)
    assert Scope.made.stays
    assert event.event is not None
    assert event is not Scope.made.event


def test_asynchronous_call_outside_of_a_capture_has_a_stream_of_its_own(monkeypatch) -> None:
    event = run(monkeypatch, async_finish=True, is_capturing=False)
    assert not Scope.made.stays
    assert event is Scope.made.event


@pytest.mark.parametrize("is_capturing", [False, True])
def test_call_without_an_event_stays(monkeypatch, is_capturing) -> None:
    assert run(monkeypatch, async_finish=False, is_capturing=is_capturing).event is None
    assert Scope.made.stays
