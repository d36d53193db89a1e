"""Owns the words for what the kernels of the normal calls report beside waits: arguments that are wrong on a rank."""

from __future__ import annotations

from collections.abc import Sequence

from deep_ep_core.errors import ConfigError, DeepEPError, RankMismatchError
from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField
from deep_ep_core.wait import TimeoutReport
from deep_ep_legacy.device.normal_kernels import NUM_AGREED

__all__ = ["PHASES", "PHASE_CLAIM", "PHASE_DISAGREE", "PHASE_WORST", "explain"]

PHASES = (
    "the opening of a normal call",
    "the exchange of row counts",
    "the rows of a normal call",
    "the reading of rows of a normal call",
    "the agreement of a normal call's ranks",
    "the check of num_tokens_per_rank",
    "the check of num_worst_tokens",
)
"""What the phases of all kernels are called, in the order of the constants in `rank_state.cuh`."""

PHASE_DISAGREE = 4
"""No wait: ranks opened a call with different arguments."""

PHASE_CLAIM = 5
"""No wait: `num_tokens_per_rank` of a rank is not what its routing says."""

PHASE_WORST = 6
"""No wait: more rows come to a rank than its `num_worst_tokens`."""

_HANDLE_IDX = NUM_AGREED - 1


def explain(fields: Sequence[AgreedField], num_ranks: int, report: TimeoutReport) -> DeepEPError | None:
    """The error for a record that is not of a wait; None where it is. Nothing was moved.

    Args:
        fields: What the ranks of the call must agree on, in the places of their values.
        num_ranks: Ranks of the group.
        report: The record.
    """
    if report.phase not in PHASES[PHASE_DISAGREE:]:
        return None
    phase = PHASES.index(report.phase)
    if phase == PHASE_CLAIM:
        return ConfigError(
            f"num_tokens_per_rank must count the tokens of is_token_in_rank, {report.expected} for rank "
            f"{report.waited_ns} (got {report.seen} on rank {report.peer}, seen on rank {report.rank}); pass both as "
            "get_dispatch_layout returned them"
        )
    if phase == PHASE_WORST:
        return rejected(
            report.rank,
            f"num_worst_tokens must be at least the {report.expected} tokens that rank {report.peer} receives",
            report.seen,
            "nothing was sent, pass the most tokens of a rank times the number of ranks",
        )
    value_idx = report.waited_ns
    if value_idx == _HANDLE_IDX:
        return rejected(
            report.rank,
            "handle must be of the same dispatch on every rank",
            f"one with other counts on rank {report.peer}",
            "pass the handles of one dispatch",
        )
    field = fields[value_idx] if value_idx < len(fields) else AgreedField(name=f"value {value_idx}", value=0)
    # Of the others this record says nothing.
    values: list[object] = [None] * num_ranks
    values[report.rank], values[report.peer] = field.show(report.expected), field.show(report.seen)
    return RankMismatchError(
        f"every rank of the group must call Buffer with the same {field.name} (got {values[report.rank]} on rank "
        f"{report.rank} and {values[report.peer]} on rank {report.peer}); nothing was sent, make the ranks agree and "
        "call again",
        field=field.name,
        values=values,
    )
