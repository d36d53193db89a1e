"""Which low-latency calls receive when: by their hooks, before a third call, at the end."""

from __future__ import annotations

from typing import Any

import torch

from deep_ep_legacy.low_latency_pending import PendingCalls

CPU = torch.device("cpu")


class Call:
    """A call that notes when it receives."""

    def __init__(self, name: str, received: list[str]) -> None:
        self.name, self.received = name, received

    def complete(self) -> None:
        self.received.append(self.name)


def send(calls: PendingCalls, name: str, received: list[str]) -> Any:
    calls.make_room()
    calls.count()
    return calls.add(Call(name, received), CPU)  # type: ignore[arg-type]


def test_hooks_receive_once_and_in_any_order() -> None:
    received: list[str] = []
    calls = PendingCalls(2)
    hooks = [send(calls, name, received) for name in "ab"]
    for hook in (hooks[1], hooks[0], hooks[1]):
        hook()
    assert received == ["b", "a"]


def test_third_call_receives_for_the_first_only() -> None:
    """Its memory is what the third one takes; that of the second is still its own."""
    received: list[str] = []
    calls = PendingCalls(2)
    hooks = [send(calls, name, received) for name in "abc"]
    assert received == ["a"]
    hooks[0]()
    assert received == ["a"]
    # A call that was not split takes its turn too.
    calls.make_room()
    calls.count()
    assert received == ["a", "b"]


def test_any_number_may_be_under_way_where_there_is_no_limit() -> None:
    received: list[str] = []
    calls = PendingCalls(None)
    hooks = [send(calls, name, received) for name in "abcd"]
    assert received == []
    hooks[2]()
    calls.complete_all(lambda: False)
    assert received == ["c", "a", "b", "d"]


def test_nothing_is_waited_for_after_a_failure() -> None:
    received: list[str] = []
    calls = PendingCalls(2)
    hook = send(calls, "a", received)
    calls.complete_all(lambda: True)
    assert received == []
    hook()
    assert received == ["a"], "the hook itself says what is wrong"
