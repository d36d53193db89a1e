"""Owns the answer to "who is late?" between two ranks: the waiting of ranks for each other is followed to its end.

In a pipeline a rank waits for its neighbour, which waits for its own. Ranks that gave up say whom they waited for, by
core's roll call. It does not detect failures; the backend does.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from deep_ep_core.errors import CommTimeoutError
from deep_ep_core.roll_call import RankReport, RollCall

__all__ = ["LatePeers", "follow_waits"]

# Part of the timeout kept back to ask who is late, and its upper bound.
_ROLL_CALL_SHARE = 0.25
_MAX_ROLL_CALL_S = 3.0
# Longest wait for the store when a refusal is posted or withdrawn.
_MAX_POST_S = 1.0
# There is no common count of operations, so every report that stands counts.
_OPERATION_IDX = 1


class LatePeers:
    """Names the rank that a failed send or receive waited for in the end.

    Args:
        store: A `torch.distributed` store that all ranks share, and nobody else.
        rank: This rank.
        num_ranks: Number of ranks in the group.
        timeout_s: How long a call may wait, this search included.
    """

    def __init__(self, store: Any, *, rank: int, num_ranks: int, timeout_s: float) -> None:
        self._roll_call = RollCall(store, rank=rank, num_ranks=num_ranks)
        self._rank = rank
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        self._has_refused = False
        self.search_s = min(_MAX_ROLL_CALL_S, timeout_s * _ROLL_CALL_SHARE)

    def report_rejection(self, operation: str, reason: str) -> None:
        """Leave word that this rank refused a call, until its next one. Never raises."""
        self._has_refused = True
        self._roll_call.post(self._report(operation, rejection=reason), timeout_s=_MAX_POST_S)

    def withdraw_rejection(self) -> None:
        """Take the word back: this rank goes on, so its refusal must not explain a later failure. Never raises."""
        if self._has_refused:
            self._roll_call.withdraw(timeout_s=_MAX_POST_S)
            self._has_refused = False

    def report_failure(self, operation: str, peer: int) -> None:
        """Say that this rank gave up waiting for `peer`. Never raises."""
        self._roll_call.post(self._report(operation, waiting_on=peer), timeout_s=_MAX_POST_S)

    def failure(self, operation: str, peer: int, cause: BaseException) -> CommTimeoutError:
        """The error for a call that failed.

        Args:
            operation: The call, for example `pp_recv #3 from rank 0`.
            peer: The rank at its other end.
            cause: What the group's backend raised.
        """
        own = self._report(operation, waiting_on=peer)
        deadline = time.monotonic() + self.search_s
        reports = None
        # A store that does not take the report does not answer either.
        if self._roll_call.post(own, timeout_s=self.search_s):
            reports = self._roll_call.collect(_OPERATION_IDX, timeout_s=max(deadline - time.monotonic(), 0.0))
        late = follow_waits(self._rank, peer, reports or {})
        return CommTimeoutError(
            describe_failure(
                own,
                reports,
                peer=peer,
                late=late,
                num_ranks=self._num_ranks,
                timeout_s=self._timeout_s,
                cause=cause,
            ),
            phase=operation,
            rank=self._rank,
            peers=[late],
            reports={rank: str(report) for rank, report in (reports or {}).items()},
        )

    def _report(self, operation: str, *, waiting_on: int | None = None, rejection: str | None = None) -> RankReport:
        return RankReport(
            rank=self._rank,
            operation_idx=_OPERATION_IDX,
            phase_idx=0,
            phase=operation,
            waiting_on=waiting_on,
            rejection=rejection,
        )


def describe_failure(
    own: RankReport,
    reports: Mapping[int, RankReport] | None,
    *,
    peer: int,
    late: int,
    num_ranks: int,
    timeout_s: float,
    cause: BaseException,
) -> str:
    """The message that names the late rank, and what it and the rank in between said of themselves.

    Args:
        own: This rank's report.
        reports: The other ranks' reports, by rank; None when they could not be asked.
        peer: The rank that this rank waited for.
        late: The rank to name, from `follow_waits`.
        num_ranks: Number of ranks in the group.
        timeout_s: How long this rank waited, in seconds.
        cause: What the group's backend raised.
    """
    lines = [
        f"the other rank must take its part in {own.phase} within {timeout_s:g} s, but rank {late} did not do its own "
        f"(seen on rank {own.rank} of {num_ranks})"
    ]
    if reports is None:
        lines.append("no rank could be asked: the group's store does not answer")
    else:
        # Usually one and the same.
        for rank in dict.fromkeys((peer, late)):
            said = reports.get(rank, "says nothing: it died, is still on its way, or is busy elsewhere")
            lines.append(f"rank {rank} {said}")
    lines.append(f"the group's backend said: {str(cause).strip()}")
    lines.append("look at that rank's own output first; a slow rank needs a longer num_cpu_timeout_secs")
    return "; ".join(lines)


def follow_waits(rank: int, peer: int, reports: Mapping[int, RankReport]) -> int:
    """The rank at the end of a chain of waits: it refused, says nothing, or waits for a rank of the chain.

    Args:
        rank: The rank that waits first.
        peer: The rank that it waits for.
        reports: What other ranks said of themselves.
    """
    chain = [rank, peer]
    while (report := reports.get(chain[-1])) is not None and report.rejection is None:
        if report.waiting_on is None or report.waiting_on in chain:
            break
        chain.append(report.waiting_on)
    return chain[-1]
