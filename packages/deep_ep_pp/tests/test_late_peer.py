"""Waits are followed to the rank that began them."""

import pytest

from deep_ep_core.roll_call import RankReport
from deep_ep_pp.late_peer import follow_waits


def waits(rank: int, waiting_on: int | None) -> RankReport:
    return RankReport(rank=rank, operation_idx=1, phase_idx=0, phase="pp_recv", waiting_on=waiting_on)


def refuses(rank: int) -> RankReport:
    return RankReport(rank=rank, operation_idx=1, phase_idx=0, phase="pp_send", rejection="too large")


@pytest.mark.parametrize(
    ("reports", "late"),
    [
        ([], 2),
        ([waits(2, 1)], 1),
        ([waits(2, 1), waits(1, 0)], 0),
        ([waits(2, 1), refuses(1), waits(0, 2)], 1),
        ([refuses(2), waits(1, 0)], 2),
        # A circle ends where it would begin again.
        ([waits(2, 3)], 2),
        ([waits(2, 1), waits(1, 2)], 1),
        # A rank that was late itself, as the group's other calls may say.
        ([waits(2, 2)], 2),
        ([waits(1, 0)], 2),
        ([waits(2, None)], 2),
    ],
    ids=str,
)
def test_the_last_rank_of_the_chain_is_the_late_one(reports, late):
    assert follow_waits(3, 2, {report.rank: report for report in reports}) == late
