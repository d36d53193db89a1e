"""Owns the words for what a kernel reported: disagreements, wrong expert ids, and waits that expired."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deep_ep_core.errors import ConfigError, RankMismatchError
from deep_ep_core.transport import AgreedField
from deep_ep_core.wait import TimeoutLog
from deep_ep_ep.device.opening import OperationKind
from deep_ep_ep.device.state import PHASE_DISAGREE, PHASE_INVALID, PHASES

__all__ = ["raise_failure"]


def raise_failure(
    log: TimeoutLog, fields: Sequence[AgreedField], opened_values: Callable[[int], list[int | None]]
) -> None:
    """Raise what the record of a log says.

    After a disagreement or wrong ids nothing has moved, and all ranks have counted the operation: the record is taken
    out, so that the buffer can be used again. After a wait that expired it stays.

    Args:
        log: A log with a record.
        fields: What the ranks of the operation must agree on.
        opened_values: Gives the value of each rank, by its place among these; None of a rank that has not opened the
            operation yet.
    """
    report = log.read()
    assert report is not None, "there is a record"
    phase = PHASES.index(report.phase) if report.phase in PHASES else -1
    if phase == PHASE_DISAGREE:
        log.reset()
        value_idx = _first_difference(opened_values, len(fields), report.waited_ns)
        field = fields[value_idx] if value_idx < len(fields) else AgreedField(name=f"value {value_idx}", value=0)
        values = [
            "nothing yet" if value is None else field.show(_signed(value, field.value))
            for value in opened_values(value_idx)
        ]
        listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
        raise RankMismatchError(
            f"every rank of the group must call ElasticBuffer with the same {field.name} (got {listed}; seen on rank "
            f"{report.rank}); nothing was sent, make the ranks agree and call again",
            field=field.name,
            values=values,
        )
    if phase == PHASE_INVALID:
        log.reset()
        raise ConfigError(
            "topk_idx must name experts below num_experts, each at most once in a token, or be negative for none (got "
            f"another entry for token {report.seen - 1} of rank {report.peer}, seen on rank {report.rank}); nothing "
            "was sent, check the router of that rank"
        )
    log.check()


def _first_difference(opened_values: Callable[[int], list[int | None]], num_values: int, reported_idx: int) -> int:
    """The value to name, the same one on all ranks: kernels report the first that they come across."""

    def differs(value_idx: int) -> bool:
        return len({value for value in opened_values(value_idx) if value is not None}) > 1

    kinds = {kind for kind in opened_values(0) if kind is not None}
    if kinds & {OperationKind.COMBINE, OperationKind.BARRIER, OperationKind.REFUSAL} and len(kinds) > 1:
        # The other values are not those of one list.
        return 0
    return next((value_idx for value_idx in (*range(1, num_values), 0) if differs(value_idx)), reported_idx)


def _signed(value: int, like: int) -> int:
    """A value of 32 bits as the one that was passed: AgreedField values may be negative."""
    return value - 2**32 if like < 0 and value >= 2**31 else value
