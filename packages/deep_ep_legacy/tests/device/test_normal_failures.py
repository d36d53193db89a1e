"""Words for what kernels of the normal calls report beside waits, and the sizes that the host computes for them."""

from __future__ import annotations

import pytest
import torch

from deep_ep_core.errors import ConfigError, RankMismatchError
from deep_ep_core.transport import AgreedField
from deep_ep_core.wait import TimeoutReport
from deep_ep_legacy.device.normal_failures import PHASE_CLAIM, PHASE_DISAGREE, PHASE_WORST, PHASES, explain
from deep_ep_legacy.device.normal_kernels import NUM_AGREED, combine_slots, dispatch_slots, side_bytes

FIELDS = (AgreedField(name="operation", value=1), AgreedField.of_dtype("dtype of x", torch.bfloat16))


def report(phase_idx: int, *, expected: int = 0, seen: int = 0, place: int = 0) -> TimeoutReport:
    # The place of what is wrong stands where a wait tells its length.
    return TimeoutReport(
        phase_idx=phase_idx + 3,
        phase=PHASES[phase_idx],
        rank=1,
        peer=2,
        expected=expected,
        seen=seen,
        waited_ns=place,
    )


def explained(made: TimeoutReport) -> str:
    error = explain(FIELDS, 4, made)
    assert isinstance(error, ConfigError)
    return str(error)


@pytest.mark.parametrize("phase_idx", range(PHASE_DISAGREE))
def test_wait_that_expired_is_left_to_the_log(phase_idx: int) -> None:
    assert explain(FIELDS, 4, report(phase_idx)) is None


def test_disagreement_names_the_argument_and_both_values() -> None:
    other = AgreedField.of_dtype("dtype of x", torch.float16).value
    error = explain(FIELDS, 4, report(PHASE_DISAGREE, expected=FIELDS[1].value, seen=other, place=1))
    assert isinstance(error, RankMismatchError)
    assert error.field == "dtype of x"
    assert [value is None for value in error.values] == [True, False, False, True]
    assert "bfloat16 on rank 1 and float16 on rank 2" in str(error).replace("torch.", "")


def test_handles_of_different_dispatches_are_named_as_such() -> None:
    assert "same dispatch on every rank" in explained(report(PHASE_DISAGREE, place=NUM_AGREED - 1))


def test_wrong_counts_name_the_rank_that_passed_them() -> None:
    text = explained(report(PHASE_CLAIM, expected=7, seen=8, place=3))
    assert "7 for rank 3 (got 8 on rank 2, seen on rank 1)" in text


def test_bound_that_is_too_small_names_its_rank() -> None:
    assert "at least the 30 tokens that rank 2 receives (got 20, on rank 1)" in explained(
        report(PHASE_WORST, expected=30, seen=20)
    )


@pytest.mark.parametrize("num_slots", [1, 3, 1000])
def test_stage_has_room_for_the_slots_that_are_counted(num_slots: int) -> None:
    """One byte less has room for one slot less."""
    side = side_bytes(num_sf_packs=5, num_topk=3)
    assert side % 16 == 0
    needed = 512 + num_slots * (128 + side + 4 * 8)
    sizes = {"num_ranks": 8, "row_bytes": 128}
    assert dispatch_slots(needed, **sizes, side_bytes=side) == num_slots
    assert dispatch_slots(needed - 1, **sizes, side_bytes=side) == num_slots - 1
    needed = num_slots * 8 * (128 + 4 * 3)
    assert combine_slots(needed, **sizes, num_topk=3) == num_slots
    assert combine_slots(needed - 1, **sizes, num_topk=3) == num_slots - 1
