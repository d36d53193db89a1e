"""Owns the low-latency calls of a session that have sent and not received: their order, their streams, their hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from deep_ep_legacy.low_latency_backends import CombineCall, DispatchCall

__all__ = ["PendingCalls", "RecvHook"]

RecvHook: TypeAlias = Callable[[], None]
"""Receives the rows of its call, and with them fills what the call returned. Once is enough; again does nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """One of them. Also keeps alive what is under way, where its hook was dropped."""

    call: DispatchCall | CombineCall
    number: int
    stream: torch.cuda.Stream | None

    def complete(self) -> None:
        # What it fills was allocated on the stream of the call, perhaps in inference mode: then only that mode may.
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            self.call.complete()


class PendingCalls:
    """The calls of one session, counted, and those of them whose hooks were not called.

    Args:
        max_under_way: The most calls that may have sent and not received, the next one included; None for any number.
            Calls that have received count too, since each takes its turn of the memory.
    """

    def __init__(self, max_under_way: int | None) -> None:
        self._max_under_way = max_under_way
        self._num_calls = 0
        self._pending: list[_Pending] = []

    def make_room(self) -> None:
        """Receive what the next call leaves no memory for, as its hook would."""
        if self._max_under_way is not None:
            last = self._num_calls + 1 - self._max_under_way
            for pending in [each for each in self._pending if each.number <= last]:
                self._complete(pending)

    def count(self) -> None:
        """A call has sent, and perhaps received."""
        self._num_calls += 1

    def add(self, call: DispatchCall | CombineCall, device: torch.device) -> RecvHook:
        """Keep the call that was counted last; returns its hook, which receives on the current stream of now."""
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        pending = _Pending(call, self._num_calls, stream)
        self._pending.append(pending)

        def hook() -> None:
            if pending in self._pending:
                self._complete(pending)

        return hook

    def complete_all(self, has_failed: Callable[[], bool]) -> None:
        """Receive all, unless rows may be missing for good: then nothing is waited for, and hooks say so."""
        while self._pending and not has_failed():
            self._complete(self._pending[0])

    def _complete(self, pending: _Pending) -> None:
        pending.complete()
        self._pending.remove(pending)
