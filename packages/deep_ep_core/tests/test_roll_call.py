from __future__ import annotations

import json
import threading
import time

import pytest
import torch.distributed as dist

from deep_ep_core.roll_call import RankReport, RollCall, find_culprits


class DictStore:
    """What a roll call needs of a store; `get` gives bytes, as torch's stores do."""

    def __init__(self):
        self.values = {}

    def set(self, key, text):
        self.values[key] = text.encode()

    def check(self, keys):
        return all(key in self.values for key in keys)

    def get(self, key):
        return self.values[key]


class BrokenStore(DictStore):
    """Its host is gone, and its calls say so."""

    def set(self, key, text):
        raise dist.DistNetworkError("connection reset")

    def check(self, keys):
        raise dist.DistNetworkError("connection reset")


class BlockingStore(DictStore):
    """Its host goes after so many look-ups; then its calls do not return until the test ends."""

    def __init__(self, num_checks):
        super().__init__()
        self.num_checks = num_checks
        self.released = threading.Event()

    def set(self, key, text):
        if self.num_checks == 0:
            self.released.wait()
        super().set(key, text)

    def check(self, keys):
        if self.num_checks == 0:
            self.released.wait()
        self.num_checks -= 1
        return super().check(keys)


@pytest.fixture
def blocking_store():
    stores = []

    def make(num_checks):
        stores.append(BlockingStore(num_checks))
        return stores[-1]

    yield make
    for store in stores:
        store.released.set()


def report_of(rank, operation_idx=1, phase_idx=1, **others):
    return RankReport(rank=rank, operation_idx=operation_idx, phase_idx=phase_idx, phase="the phase", **others)


def roll_calls(store, num_ranks):
    return [RollCall(store, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


@pytest.mark.parametrize("make_store", [DictStore, dist.HashStore])
def test_each_rank_hears_the_reports_of_the_others(make_store):
    calls = roll_calls(make_store(), 3)
    reports = [
        report_of(0, waiting_on=2),
        report_of(1, operation_idx=4, phase_idx=2),
        report_of(2, rejection="topk_idx is\nbad: \N{GREEK SMALL LETTER ALPHA}"),
    ]
    assert all(call.post(report, timeout_s=30) for call, report in zip(calls, reports, strict=True))
    for rank, call in enumerate(calls):
        heard = call.collect(1, timeout_s=30)
        assert heard == {report.rank: report for report in reports if report.rank != rank}


def test_nothing_is_written_before_a_report():
    store = DictStore()
    roll_calls(store, 2)
    assert store.values == {}


def test_a_report_that_comes_later_is_waited_for():
    """It ends with the last report, long before the time is over."""
    calls = roll_calls(DictStore(), 2)
    timer = threading.Timer(0.2, lambda: calls[1].post(report_of(1), timeout_s=30))
    timer.start()
    started = time.monotonic()
    assert calls[0].collect(1, timeout_s=600) == {1: report_of(1)}
    assert time.monotonic() - started < 300
    timer.join()


def test_ranks_that_say_nothing_are_left_out_when_the_time_is_over():
    calls = roll_calls(DictStore(), 4)
    calls[2].post(report_of(2), timeout_s=30)
    assert calls[0].collect(1, timeout_s=0.5) == {2: report_of(2)}


def test_reports_of_earlier_operations_do_not_count():
    calls = roll_calls(DictStore(), 4)
    for rank, operation_idx in enumerate((6, 4, 5, 6)):
        calls[rank].post(report_of(rank, operation_idx, rejection="no"), timeout_s=30)
    assert set(calls[0].collect(5, timeout_s=0.5)) == {2, 3}


def test_a_report_replaces_the_rank_s_earlier_one():
    calls = roll_calls(DictStore(), 2)
    calls[1].post(report_of(1, rejection="no"), timeout_s=30)
    calls[1].post(report_of(1, phase_idx=3), timeout_s=30)
    assert calls[0].collect(1, timeout_s=30) == {1: report_of(1, phase_idx=3)}


def test_a_report_that_is_withdrawn_is_not_heard():
    calls = roll_calls(DictStore(), 2)
    calls[1].post(report_of(1, rejection="no"), timeout_s=30)
    assert calls[1].withdraw(timeout_s=30)
    assert calls[0].collect(1, timeout_s=0.5) == {}
    calls[1].post(report_of(1, phase_idx=2), timeout_s=30)
    assert calls[0].collect(1, timeout_s=30) == {1: report_of(1, phase_idx=2)}


def test_a_group_without_a_store_is_one_that_cannot_be_asked():
    call = RollCall(None, rank=0, num_ranks=2)
    assert call.post(report_of(0), timeout_s=30) is False
    assert call.withdraw(timeout_s=30) is False
    assert call.collect(1, timeout_s=30) is None


def test_a_store_that_fails_is_one_that_cannot_be_asked():
    call = RollCall(BrokenStore(), rank=0, num_ranks=2)
    assert call.post(report_of(0), timeout_s=30) is False
    assert call.collect(1, timeout_s=30) is None


def test_a_store_that_never_answers_holds_nobody_up(blocking_store):
    call = RollCall(blocking_store(0), rank=0, num_ranks=2)
    assert call.post(report_of(0), timeout_s=0.2) is False
    assert call.collect(1, timeout_s=0.2) is None


def test_what_was_heard_before_the_store_fell_silent_counts(blocking_store):
    calls = roll_calls(blocking_store(2), 3)
    calls[1].post(report_of(1), timeout_s=30)
    assert calls[0].collect(1, timeout_s=0.5) == {1: report_of(1)}


@pytest.mark.parametrize("text", ["", "{", "[]", json.dumps({"rank": 1}), json.dumps({"colour": "red"})])
def test_what_is_no_report_is_as_good_as_no_answer(text):
    """Another version of the package, or another program, wrote it."""
    store = DictStore()
    store.set("report/1", text)
    assert RollCall(store, rank=0, num_ranks=2).collect(1, timeout_s=30) is None


def test_a_report_reads_as_the_end_of_a_sentence_about_its_rank():
    assert str(report_of(1)) == "in the phase"
    assert str(report_of(1, waiting_on=3)) == "in the phase, waiting for rank 3"
    assert str(report_of(1, waiting_on=3, rejection="x is bad")) == "refused: x is bad"


# What rank 0 of 4 knows: its own report, the reports of the others, and whom that makes responsible.
CULPRITS = {
    "nobody can be asked": (report_of(0, waiting_on=2), None, [2]),
    "nobody can be asked, and the peer is not known": (report_of(0), None, [1, 2, 3]),
    "one refused": (
        report_of(0, waiting_on=1),
        [report_of(1, waiting_on=2), report_of(2, phase_idx=0, rejection="no"), report_of(3, waiting_on=2)],
        [2],
    ),
    "several refused": (
        report_of(0, waiting_on=1),
        [report_of(1, phase_idx=0, rejection="no"), report_of(2, waiting_on=1), report_of(3, rejection="no")],
        [1, 3],
    ),
    "one refused, which makes another silent": (
        report_of(0, waiting_on=1),
        [report_of(1, waiting_on=2), report_of(3, phase_idx=0, rejection="no")],
        [3],
    ),
    "one is silent": (report_of(0, waiting_on=1), [report_of(1, waiting_on=3), report_of(2, waiting_on=3)], [3]),
    "two are silent": (report_of(0, waiting_on=1), [report_of(2, waiting_on=3)], [1, 3]),
    "all others are silent": (report_of(0, waiting_on=3), [], [1, 2, 3]),
    "a silent one comes before one that is behind": (
        report_of(0, phase_idx=2, waiting_on=1),
        [report_of(1, phase_idx=1), report_of(2, phase_idx=2)],
        [3],
    ),
    "one is in an earlier exchange": (
        report_of(0, phase_idx=3, waiting_on=1),
        [report_of(1, phase_idx=3), report_of(2, phase_idx=2), report_of(3, phase_idx=3)],
        [2],
    ),
    "one is in a later operation": (
        report_of(0, waiting_on=1),
        [report_of(1, waiting_on=2), report_of(2, waiting_on=1), report_of(3, operation_idx=2, waiting_on=1)],
        [0, 1, 2],
    ),
    "this rank is behind": (
        report_of(0, phase_idx=1, waiting_on=3),
        [report_of(1, phase_idx=2), report_of(2, phase_idx=2), report_of(3, phase_idx=2)],
        [0],
    ),
    "the others waited for this rank": (
        report_of(0, waiting_on=3),
        [report_of(1, waiting_on=0), report_of(2, waiting_on=0), report_of(3, waiting_on=1)],
        [0],
    ),
    "half of the others waited for this rank": (
        report_of(0, waiting_on=3),
        [report_of(1, waiting_on=0), report_of(2), report_of(3, waiting_on=2)],
        [3],
    ),
    "all stand alike": (
        report_of(0, waiting_on=3),
        [report_of(1, waiting_on=3), report_of(2, waiting_on=3), report_of(3, waiting_on=1)],
        [3],
    ),
    "all stand alike, and the peer is not known": (
        report_of(0),
        [report_of(1), report_of(2), report_of(3)],
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize(("own", "others", "expected"), list(CULPRITS.values()), ids=list(CULPRITS))
def test_culprits_are_those_that_the_reports_point_to(own, others, expected):
    reports = None if others is None else {report.rank: report for report in others}
    assert find_culprits(own, reports, num_ranks=4) == expected


def test_a_rank_other_than_0_is_told_apart_from_its_peers():
    own = report_of(2, waiting_on=0)
    assert find_culprits(own, {0: report_of(0)}, num_ranks=3) == [1]
    assert find_culprits(own, {0: report_of(0, waiting_on=2), 1: report_of(1, waiting_on=2)}, num_ranks=3) == [2]
