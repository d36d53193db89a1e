"""Owns signals between streams of ranks that take no SM: words that one rank's stream writes and another's waits for.

The words lie in windows, each in memory of the rank that waits for it; which word means what, and what values it takes,
belongs to the features. Waits have deadlines, kept by `signal_watch`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from deep_ep_core.errors import CommTimeoutError
from deep_ep_core.refusals import rejected
from deep_ep_core.signal_device import SignalDevice
from deep_ep_core.signal_watch import Awaited, SignalWatch
from deep_ep_core.wait import timeout_to_ns

__all__ = ["Awaited", "StreamSignals"]


class StreamSignals:
    """Writes words and waits for words, in streams of one device.

    A word counts up: a wait is over when `word - least`, taken as a signed number of 64 bits, is not negative. A stream
    that waits may hold up others that share its hardware queue (`CUDA_DEVICE_MAX_CONNECTIONS`), so what a peer needs in
    order to write the word must be enqueued before the wait, as in a program with one stream. Any thread may call, but
    no two at once for one stream.

    When a wait expires, the watcher sets this rank's words to what its streams wait for, so that they go on with what
    is there, and every later call raises. Results from then on are not to be used; the CUDA context stays as it was.

    Args:
        device: CUDA device of the streams.
        rank: This rank, for messages.
        timeout_s: How long a wait may take, in seconds, from when its stream reaches it.
        name: Whose signals these are, for messages.

    Raises:
        ConfigError: The timeout is not above 0, or cuda-bindings is not installed.
        TransportError: The device has no memory operations of 64 bits in streams.

    Collective: no. Not for streams that a CUDA graph captures: a replay would write and await the values of the
    capture, and a wait in it would have no deadline.
    """

    def __init__(self, device: torch.device, *, rank: int, timeout_s: float, name: str) -> None:
        timeout_to_ns(timeout_s)
        self._rank = rank
        self._timeout_s = timeout_s
        self._name = name
        self._is_closed = False
        self._device = SignalDevice(device)
        self._watch = SignalWatch(self._device, timeout_s=timeout_s, name=f"{name} signals, rank {rank}")

    def write(self, stream: int, address: int, value: int) -> None:
        """Set a word, behind what the stream has so far: whoever sees the value sees all that the stream wrote before.

        Args:
            stream: Handle of the stream; its device must be current.
            address: The word, 8 bytes and so aligned, where this rank sees it; most often a peer's.
            value: What to write.

        Raises:
            CommTimeoutError: A wait has expired.
            ConfigError: A graph captures the stream, or this object is closed.

        Collective: no. Does not block the host.
        """
        self.check_usable(stream)
        self._device.write(stream, address, value)

    def write_all(self, stream: int, words: Sequence[tuple[int, int]]) -> None:
        """Set several words, in this order: cheaper for the host than `write` for each.

        Args:
            stream: Handle of the stream; its device must be current.
            words: Address and value of each.

        Raises:
            CommTimeoutError: A wait has expired.
            ConfigError: A graph captures the stream, or this object is closed.

        Collective: no. Does not block the host.
        """
        self.check_usable(stream)
        for address, value in words:
            self._device.write(stream, address, value)

    def wait(self, stream: int, address: int, least: int, *, peer: int, phase: str) -> None:
        """Let a stream wait until a word has come to a value.

        Args:
            stream: Handle of the stream; its device must be current.
            address: The word, in memory of this rank.
            least: What it must come to.
            peer: The rank that writes it, for messages.
            phase: What this rank is doing, for messages.

        Raises:
            CommTimeoutError: A wait has expired.
            ConfigError: A graph captures the stream, or this object is closed.

        Collective: no. Does not block the host.
        """
        self.wait_all(stream, (Awaited(address, least, peer),), phase=phase)

    def wait_all(self, stream: int, words: Sequence[Awaited], *, phase: str) -> None:
        """Let a stream wait for several words, under one deadline.

        Cheaper than `wait` for each, and all that are late are named.

        Args:
            stream: Handle of the stream; its device must be current.
            words: The words, in memory of this rank.
            phase: What this rank is doing, for messages.

        Raises:
            CommTimeoutError: A wait has expired.
            ConfigError: A graph captures the stream, or this object is closed.

        Collective: no. Does not block the host.
        """
        self.check_usable(stream)
        if words:
            self._watch.add(stream, words, phase)

    def check(self) -> None:
        """Raise if a wait has expired, at every call from then on. No CUDA call.

        Behind a synchronisation, this tells of all that ran before: a stream is set free only after its wait is noted.

        Raises:
            CommTimeoutError: It names what this rank was doing, the ranks that did not come, and what was expected and
                seen of the first of them.
        """
        expired = self._watch.expired
        if expired is None:
            return
        (first, seen), *others = expired.late
        also = ", as words could not be read" if seen is None else ""
        if others:
            ranks = ", ".join(str(word.peer) for word, _ in others)
            also += f" (late too{', perhaps' if seen is None else ''}: rank {ranks})"
        raise CommTimeoutError(
            f"{self._name}: {expired.phase}: rank {self._rank} waited {self._timeout_s:.3g} s for rank {first.peer}, "
            f"which must come to {first.least} and was at {'an unknown place' if seen is None else seen}{also}; see "
            f"what stopped rank {first.peer}, or raise the timeout if it was only slow. What was under way is lost: "
            "make the buffer anew on all ranks, or stop",
            phase=expired.phase,
            rank=self._rank,
            peers=[word.peer for word, _ in expired.late],
            expected=first.least,
            seen=seen,
        )

    def check_usable(self, stream: int) -> None:
        """Raise what `write` and `wait` would raise, so that it comes before work that belongs to a signal.

        Args:
            stream: Handle of the stream.

        Raises:
            CommTimeoutError: A wait has expired.
            ConfigError: A graph captures the stream, or this object is closed.

        Collective: no.
        """
        self.check()
        if self._is_closed:
            raise rejected(self._rank, f"the signals of {self._name} must be open", "closed ones", "make a new buffer")
        if self._device.is_captured(stream):
            raise rejected(
                self._rank,
                f"{self._name} must not be captured in a CUDA graph, whose replay would wait for the values of the "
                "capture without a deadline",
                "a stream that is being captured",
                "call it outside of the capture",
            )

    def abandon(self) -> None:
        """Set this rank's streams free from all waits that they have, since what they wait for is of no use any more.

        For an owner that has failed in another way; nothing can be written or awaited from then on. Returns at once.
        Collective: no.
        """
        self._is_closed = True
        self._watch.abandon()

    def close(self) -> None:
        """Give back what the signals hold, once all streams are through their waits. May be repeated.

        Close before the memory of the words goes. The host waits; each wait has its deadline. Collective: no.
        """
        self._is_closed = True
        self._watch.finish(wait=True)

    def __del__(self) -> None:
        # Where the interpreter ends, the driver and the thread may be gone already.
        watch = getattr(self, "_watch", None)
        if watch is not None and not sys.is_finalizing():
            watch.finish(wait=False)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "a wait has expired" if self._watch.expired else "no wait has expired"
        return f"StreamSignals({self._name}, rank {self._rank}, {state})"
