"""What a kernel's record is turned into: who disagrees about what, who routes to nowhere, who did not come."""

from __future__ import annotations

import pytest
import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError
from deep_ep_core.transport import AgreedField
from deep_ep_core.wait import TimeoutLog
from deep_ep_ep.device.failures import raise_failure
from deep_ep_ep.device.opening import OperationKind, agreed_fields
from deep_ep_ep.device.state import PHASE_DISAGREE, PHASE_INVALID, PHASES

FIELDS = agreed_fields(
    OperationKind.DISPATCH,
    [AgreedField(name="num_experts", value=16), AgreedField.of_dtype("dtype of x", torch.bfloat16)],
)
OWN = [int(field.value) for field in FIELDS]


def log_with(phase: int, *, rank: int = 1, peer: int = 2, expected: int = 0, seen: int = 0, waited_ns: int = 0):
    """A log in which a kernel has left this record."""
    log = TimeoutLog(rank=rank, device=torch.device("cpu"))
    assert log.add_phases(PHASES) == 0
    log.add_phases(["barrier"])
    record = log._record
    record.phase, record.rank, record.peer = phase, rank, peer
    record.expected, record.seen, record.waited_ns = expected, seen, waited_ns
    record.state = 1
    return log


def told(log: TimeoutLog, opened: list[list[int | None]]) -> Exception:
    """What is raised where rank r has opened the operation with the values `opened[r]`."""
    with pytest.raises((ConfigError, CommTimeoutError)) as caught:
        raise_failure(log, FIELDS, lambda value_idx: [values[value_idx] for values in opened])
    return caught.value


def test_disagreement_tells_what_each_rank_passed() -> None:
    other = [OWN[0], 32, OWN[2]]
    log = log_with(PHASE_DISAGREE, expected=16, seen=32, waited_ns=1)
    error = told(log, [list(OWN), list(OWN), other])
    assert isinstance(error, RankMismatchError)
    assert error.field == "num_experts"
    assert error.values == ("16", "16", "32")
    assert "the same num_experts (got rank 0: 16, rank 1: 16, rank 2: 32; seen on rank 1)" in str(error)
    assert not log.has_record, "the buffer can be used again"


def test_disagreement_about_a_dtype_names_the_dtypes() -> None:
    wide = AgreedField.of_dtype("dtype of x", torch.float32).value & 0xFFFFFFFF
    error = told(log_with(PHASE_DISAGREE, waited_ns=2), [list(OWN), [*OWN[:2], wide]])
    assert isinstance(error, RankMismatchError)
    assert error.values == ("bfloat16", "float32")


@pytest.mark.parametrize("reported_idx", [1, 2])
def test_all_ranks_name_the_same_value_whichever_their_kernels_came_across(reported_idx: int) -> None:
    error = told(log_with(PHASE_DISAGREE, waited_ns=reported_idx), [list(OWN), [OWN[0], 32, 7]])
    assert isinstance(error, RankMismatchError)
    assert error.field == "num_experts"


@pytest.mark.parametrize("reported_idx", [0, 1, 2])
def test_another_operation_is_named_rather_than_values_that_mean_something_else(reported_idx: int) -> None:
    error = told(
        log_with(PHASE_DISAGREE, waited_ns=reported_idx), [list(OWN), list(OWN), [OperationKind.COMBINE, 3, 256]]
    )
    assert isinstance(error, RankMismatchError)
    assert error.field == "operation"
    assert error.values == ("dispatch", "dispatch", "combine")


def test_a_cpu_sync_on_some_ranks_only_is_named_as_such() -> None:
    error = told(log_with(PHASE_DISAGREE), [list(OWN), [OperationKind.PLAN, *OWN[1:]]])
    assert isinstance(error, RankMismatchError)
    assert error.values == ("dispatch", "dispatch with CPU sync")


def test_a_rank_that_has_not_come_yet_is_not_said_to_have_passed_something() -> None:
    late: list[int | None] = [None, None, None]
    error = told(log_with(PHASE_DISAGREE, waited_ns=1), [list(OWN), [OWN[0], 32, OWN[2]], late])
    assert isinstance(error, RankMismatchError)
    assert error.values == ("16", "32", "nothing yet")


def test_negative_values_are_shown_with_their_sign() -> None:
    fields = agreed_fields(OperationKind.COMBINE, [AgreedField(name="shift", value=-3)])
    log = log_with(PHASE_DISAGREE, waited_ns=1)
    opened = {0: [3, 3], 1: [-3 & 0xFFFFFFFF, 5]}
    with pytest.raises(RankMismatchError) as caught:
        raise_failure(log, fields, lambda value_idx: list(opened[value_idx]))
    assert caught.value.values == ("-3", "5")


def test_wrong_expert_ids_are_named_by_rank_and_token() -> None:
    log = log_with(PHASE_INVALID, peer=3, seen=1 + 7, waited_ns=11)
    error = told(log, [list(OWN)] * 4)
    assert isinstance(error, ConfigError)
    assert not isinstance(error, RankMismatchError)
    assert "for token 7 of rank 3, seen on rank 1" in str(error)
    assert not log.has_record, "the buffer can be used again"


@pytest.mark.parametrize("phase", [0, 1, 2, 3, 4, 5, 6, len(PHASES)])
def test_a_wait_that_expired_is_told_again_and_again(phase: int) -> None:
    """Also one of a barrier, whose phase stands behind those of the kernels."""
    log = log_with(phase, peer=3, expected=9, seen=8, waited_ns=2 * 10**9)
    for _ in range(2):
        error = told(log, [list(OWN)] * 4)
        assert isinstance(error, CommTimeoutError)
        assert error.peers == (3,)
        assert error.phase == [*PHASES, "barrier"][phase]
        assert "waited 2 s for rank 3" in str(error)
    assert log.has_record
