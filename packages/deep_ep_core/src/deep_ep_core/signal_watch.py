"""Owns the deadlines of waits in streams: a thread that watches them, and sets the streams free when one expires.

A stream that waits for a word runs no code that could look at a clock, so the host must. Messages and calls are in
`stream_signals`, the driver in `signal_device`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from deep_ep_core.errors import TransportError
from deep_ep_core.signal_device import SignalDevice

__all__ = ["Awaited", "ExpiredWait", "SignalWatch"]

_logger = logging.getLogger("deep_ep_core")

# A deadline is kept to a fiftieth, and polled for no more often than needed: the thread takes the interpreter's lock.
_POLLS_PER_TIMEOUT = 50
_MIN_POLL_S, _MAX_POLL_S = 0.001, 0.02
# Whoever adds the wait behind so many clears away those of its stream that are over.
_MANY_WAITS = 64
_WORD_MASK = 2**64 - 1
_SIGN_BIT = 2**63


class Awaited(NamedTuple):
    """A word that a stream waits for.

    Attributes:
        address: Where it is, in memory of this rank.
        least: What it must come to.
        peer: The rank that writes it.
    """

    address: int
    least: int
    peer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpiredWait:
    """What is known of the first wait that expired.

    Attributes:
        phase: What the rank was doing.
        late: Words that had not come, at least one, with what was seen in each. None is for words that could not be
            read, some of which may have come.
    """

    phase: str
    late: tuple[tuple[Awaited, int | None], ...]


@dataclass(slots=True, kw_only=True, eq=False)
class _Wait:
    before: Any
    after: Any
    words: tuple[Awaited, ...]
    phase: str
    reached_at: float | None = None


class SignalWatch:
    """Watches the waits of one owner.

    The thread begins with the first wait, sleeps while there is none, and ends behind `finish` or an expiry once all
    streams are through their waits. It is a daemon, and refers to nothing but this object.

    Args:
        device: Where the words are.
        timeout_s: How long a wait may take from when its stream reaches it.
        name: Name of the thread.

    Attributes:
        expired: The first wait that expired, or None. Its streams are free then, with words that no peer has written.
    """

    def __init__(self, device: SignalDevice, *, timeout_s: float, name: str) -> None:
        self.expired: ExpiredWait | None = None
        self._device = device
        self._timeout_s = timeout_s
        self._name = name
        self._poll_s = min(max(timeout_s / _POLLS_PER_TIMEOUT, _MIN_POLL_S), _MAX_POLL_S)
        self._queues: dict[int, deque[_Wait]] = {}
        self._has_news = threading.Condition()
        self._is_prepared = False
        self._is_abandoned = False
        self._is_finishing = False
        self._is_running = False
        self._thread: threading.Thread | None = None

    def add(self, stream: int, words: Sequence[Awaited], phase: str) -> None:
        """Enqueue a wait for words, one after the other, under one deadline."""
        if not self._is_prepared:
            self._device.prepare(words[0].address)
            self._is_prepared = True
        before = self._device.record(stream)
        for word in words:
            self._device.wait(stream, word.address, word.least)
        wait = _Wait(before=before, after=self._device.record(stream), words=tuple(words), phase=phase)
        with self._has_news:
            queue = self._queues.setdefault(stream, deque())
            if queue and len(queue) % _MANY_WAITS == 0:
                with self._device.captures_left_alone():
                    self._drop_done(queue)
            queue.append(wait)
            if self._is_running:
                self._has_news.notify()
            else:
                self._is_running = True
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def abandon(self) -> None:
        """Set the streams free from all waits that they have or come to. Returns at once."""
        with self._has_news:
            self._is_abandoned = True
            self._has_news.notify()

    def finish(self, *, wait: bool) -> None:
        """Let the thread end once all streams are through their waits, and close the device behind it.

        Args:
            wait: Whether to return only then.
        """
        with self._has_news:
            self._is_finishing = True
            is_running, thread = self._is_running, self._thread
            self._has_news.notify()
        if wait and thread is not None:
            thread.join()
        if wait or not is_running:
            self._device.close()

    def _run(self) -> None:
        try:
            with self._device.current(), self._device.captures_left_alone():
                while self._sleep_until_needed():
                    self._poll()
                    time.sleep(self._poll_s)
        except TransportError as error:
            # The device is lost, which the next call of its owner finds out by itself.
            _logger.warning("%s ended: %s", self._name, error)
            with self._has_news:
                self._is_running = False
        if self._is_finishing:
            self._device.close()

    def _sleep_until_needed(self) -> bool:
        """Wait until there is something to watch. False: the thread is to end, and has said so."""
        with self._has_news:
            while not any(self._queues.values()):
                if self._is_finishing or self._has_failed:
                    self._is_running = False
                    return False
                self._has_news.wait()
        return True

    def _poll(self) -> None:
        now = time.monotonic()
        overdue: list[_Wait] = []
        with self._has_news:
            for queue in self._queues.values():
                self._drop_done(queue)
                if not queue:
                    continue
                head = queue[0]
                if head.reached_at is None:
                    if self._device.is_done(head.before):
                        head.reached_at = now
                elif now - head.reached_at > self._timeout_s:
                    overdue.append(head)
        for wait in overdue:
            if not self._has_failed:
                self._judge(wait, now)
        if self._has_failed:
            self._set_streams_free()

    @property
    def _has_failed(self) -> bool:
        return self.expired is not None or self._is_abandoned

    def _drop_done(self, queue: deque[_Wait]) -> None:
        # A stream is through its waits in their order.
        while queue and self._device.is_done(queue[0].after):
            wait = queue.popleft()
            self._device.recycle(wait.before)
            self._device.recycle(wait.after)

    def _judge(self, wait: _Wait, now: float) -> None:
        seen = self._device.read_now([word.address for word in wait.words])
        late = tuple(
            (word, value)
            for word, value in zip(wait.words, seen, strict=True)
            if value is None or _is_before(value, word.least)
        )
        if late:
            self.expired = ExpiredWait(phase=wait.phase, late=late)
        else:
            # The last word came this very moment; the stream goes on by itself.
            wait.reached_at = now

    def _set_streams_free(self) -> None:
        """Write what is awaited. Again at each poll: a peer that is late may set a word back."""
        with self._has_news:
            words = [word for queue in self._queues.values() for wait in queue for word in wait.words]
        most: dict[int, int] = {}
        for word in words:
            if word.address not in most or _is_before(most[word.address], word.least):
                most[word.address] = word.least
        if most:
            self._device.write_now(most)


def _is_before(value: int, least: int) -> bool:
    """Whether a word does not fulfil a wait, by the rule of `cuStreamWaitValue64`."""
    return bool(((value - least) & _WORD_MASK) & _SIGN_BIT)
