"""Owns the answer to "who is late?": after a failed exchange every surviving rank says where it stands, and why.

The reports travel through the key-value store of the process group, which still answers when the group's connections
are broken. Nothing is written while all goes well. It does not detect failures; `transport` does.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

__all__ = ["RankReport", "RollCall", "describe_failure", "find_culprits"]

_POLL_INTERVAL_S = 0.02

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What a rank says of itself when it could not finish an operation.

    Attributes:
        rank: The rank that reports.
        operation_idx: How many operations it had begun, this one included.
        phase_idx: How many exchanges of this operation it had begun.
        phase: What it was doing, in words.
        waiting_on: The peer whose message it did not get, or None.
        rejection: Why it refused the operation before taking part, or None.
    """

    rank: int
    operation_idx: int
    phase_idx: int
    phase: str
    waiting_on: int | None = None
    rejection: str | None = None

    def __str__(self) -> str:
        if self.rejection is not None:
            return f"refused: {self.rejection}"
        peer = "" if self.waiting_on is None else f", waiting for rank {self.waiting_on}"
        return f"in {self.phase}{peer}"


class RollCall:
    """Posts and collects the reports of one group.

    Args:
        store: The group's store (anything with `set`, `check` and `get`), or None where the group has none.
        rank: This rank.
        num_ranks: Number of ranks in the group.
    """

    def __init__(self, store: Any | None, *, rank: int, num_ranks: int) -> None:
        self._store = store
        self._rank = rank
        self._num_ranks = num_ranks

    def post(self, report: RankReport, *, timeout_s: float) -> bool:
        """Publish this rank's report; returns whether that worked. Never raises, never blocks past `timeout_s`."""
        if self._store is None:
            return False
        text = json.dumps(asdict(report))
        return _bounded(lambda: self._post_now(text), timeout_s, default=False)

    def _post_now(self, text: str) -> bool:
        assert self._store is not None
        self._store.set(self._key(self._rank), text)
        return True

    def withdraw(self, *, timeout_s: float) -> bool:
        """Take this rank's report back; returns whether that worked. Never raises, never blocks past `timeout_s`."""
        # Operations count from 1, so this is older than any that may be asked about.
        return self.post(
            RankReport(rank=self._rank, operation_idx=0, phase_idx=0, phase="nothing"), timeout_s=timeout_s
        )

    def collect(self, operation_idx: int, *, timeout_s: float) -> dict[int, RankReport] | None:
        """The reports of the other ranks on this operation or a later one, by rank.

        Waits until all have reported or the time is over. Never raises, never blocks past `timeout_s`.

        Returns:
            The reports, or None when the store does not answer.
        """
        if self._store is None:
            return None
        deadline = time.monotonic() + timeout_s
        # The latest answer, so that it counts also where the store falls silent afterwards.
        answer: list[dict[int, RankReport]] = []
        _bounded(lambda: self._collect_until(operation_idx, deadline, answer), timeout_s, default=None)
        return answer[0] if answer else None

    def _collect_until(self, operation_idx: int, deadline: float, answer: list[dict[int, RankReport]]) -> None:
        assert self._store is not None
        reports: dict[int, RankReport] = {}
        others = [rank for rank in range(self._num_ranks) if rank != self._rank]
        while True:
            for rank in others:
                if rank in reports or not self._store.check([self._key(rank)]):
                    continue
                report = RankReport(**json.loads(self._store.get(self._key(rank))))
                # An older report is left over from an operation that all ranks survived, or was withdrawn.
                if report.operation_idx >= operation_idx:
                    reports[rank] = report
            answer[:] = [dict(reports)]
            if len(reports) == len(others) or time.monotonic() >= deadline:
                return
            time.sleep(_POLL_INTERVAL_S)

    @staticmethod
    def _key(rank: int) -> str:
        return f"report/{rank}"


def find_culprits(own: RankReport, reports: Mapping[int, RankReport] | None, *, num_ranks: int) -> list[int]:
    """The ranks that kept `own.rank` from finishing, from what is known.

    The first of these that there are: ranks that refused; ranks that say nothing (dead, still on their way, or done
    and busy elsewhere); ranks that had begun less than the others; this rank itself, if most others waited for it; the
    peer that this rank waited for; all others.

    Args:
        own: This rank's report.
        reports: The other ranks' reports, by rank; None when they could not be asked.
        num_ranks: Number of ranks in the group.

    Returns:
        The ranks, ascending; never empty.
    """
    others = [rank for rank in range(num_ranks) if rank != own.rank]
    direct = others if own.waiting_on is None else [own.waiting_on]
    if reports is None:
        return direct
    if refused := sorted(rank for rank, report in reports.items() if report.rejection is not None):
        return refused
    if silent := [rank for rank in others if rank not in reports]:
        return silent
    everyone = {own.rank: own, **reports}
    progress = {rank: (report.operation_idx, report.phase_idx) for rank, report in everyone.items()}
    if behind := sorted(rank for rank in everyone if progress[rank] < max(progress.values())):
        return behind
    blamed = [report.waiting_on for rank, report in everyone.items() if rank != own.rank]
    if blamed.count(own.rank) * 2 > len(blamed):
        return [own.rank]
    return direct


def describe_failure(
    own: RankReport,
    reports: Mapping[int, RankReport] | None,
    *,
    peers: Sequence[int],
    num_ranks: int,
    timeout_s: float,
    cause: BaseException,
) -> str:
    """The message that names who is late, and what each of them said of itself.

    Args:
        own: This rank's report.
        reports: The other ranks' reports, by rank; None when they could not be asked.
        peers: The ranks to name, from `find_culprits`.
        num_ranks: Number of ranks in the group.
        timeout_s: How long this rank waited, in seconds.
        cause: What the group's backend raised.
    """
    who = f"rank {peers[0]}" if len(peers) == 1 else f"ranks {', '.join(map(str, peers))}"
    if list(peers) == [own.rank]:
        who = f"rank {own.rank} (this rank) was late and"
    lines = [
        f"every rank must take part in {own.phase} within {timeout_s:g} s, but {who} did not "
        f"(seen on rank {own.rank} of {num_ranks})"
    ]
    for rank in peers:
        if reports is None:
            lines.append("the other ranks could not be asked: the group's store does not answer")
            break
        if rank in reports:
            lines.append(f"rank {rank} {reports[rank]}")
        elif rank != own.rank:
            lines.append(f"rank {rank} says nothing: it died, is still on its way, or is done and busy elsewhere")
    lines.append(f"the group's backend said: {str(cause).strip()}")
    lines.append("look at that rank's own output first; a slow rank needs a longer num_cpu_timeout_secs")
    return "; ".join(lines)


def _bounded(call: Callable[[], _Result], timeout_s: float, *, default: _Result) -> _Result:
    """Run `call` on a thread of its own, since a store without its host may block; `default` if it fails or is late."""
    result = [default]

    def target() -> None:
        try:
            result[0] = call()
        except Exception:  # the store's clients raise many types; any of them means that it does not answer
            return

    thread = threading.Thread(target=target, name="deep-ep-roll-call", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return result[0]
