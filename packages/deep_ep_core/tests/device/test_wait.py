"""What the host makes of a record that a kernel left behind. The device side is in gpu_check.py."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError
from deep_ep_core.wait import TimeoutLog, TimeoutRecord, WaitParams, timeout_to_ns

CPU = torch.device("cpu")


def leave_record(
    params: WaitParams, *, phase_idx: int, peer: int, expected: int, seen: int, is_whole: bool = True
) -> None:
    """Does what `report_timeout` does on the device."""
    record = TimeoutRecord.from_address(params.record)
    record.phase = params.first_phase + phase_idx
    record.rank, record.peer = params.rank, peer
    record.expected, record.seen = expected, seen
    record.waited_ns = params.timeout_ns + 1
    record.state = int(is_whole)
    ctypes.c_int32.from_address(params.has_expired).value = 1


def test_log_without_a_record_raises_nothing() -> None:
    log = TimeoutLog(rank=2, device=CPU)
    log.check()
    assert not log.has_record
    assert "no wait has expired" in repr(log)


def test_record_becomes_an_error_that_names_the_late_rank() -> None:
    log = TimeoutLog(rank=2, device=CPU)
    log.add_phases(["barrier"])
    params = log.params(first_phase=log.add_phases(["dispatch: counts", "dispatch: payload"]), timeout_s=1.5)
    leave_record(params, phase_idx=1, peer=5, expected=12, seen=11)
    assert log.has_record
    with pytest.raises(CommTimeoutError) as caught:
        log.check()
    error = caught.value
    assert (error.phase, error.rank, error.peers) == ("dispatch: payload", 2, (5,))
    assert (error.expected, error.seen) == (12, 11)
    for words in (
        "dispatch: payload",
        "rank 2 waited 1.5 s for rank 5",
        "come to 12 and was at 11",
        "raise the timeout",
    ):
        assert words in str(error)


def test_error_comes_again_until_reset() -> None:
    """Whoever swallows the first one must not go on with what the kernels left."""
    log = TimeoutLog(rank=0, device=CPU)
    params = log.params(first_phase=log.add_phases(["barrier"]), timeout_s=1)
    leave_record(params, phase_idx=0, peer=1, expected=2, seen=1)
    for _ in range(2):
        with pytest.raises(CommTimeoutError):
            log.check()
    log.reset()
    log.check()
    assert ctypes.c_int32.from_address(params.has_expired).value == 0
    assert bytes(TimeoutRecord.from_address(params.record)) == bytes(ctypes.sizeof(TimeoutRecord))


def test_log_made_in_inference_mode_is_reset_outside_of_it() -> None:
    with torch.inference_mode():
        log = TimeoutLog(rank=0, device=CPU)
    leave_record(
        log.params(first_phase=log.add_phases(["barrier"]), timeout_s=1), phase_idx=0, peer=1, expected=2, seen=1
    )
    log.reset()
    log.check()


def test_half_written_record_is_not_read() -> None:
    log = TimeoutLog(rank=0, device=CPU)
    params = log.params(first_phase=log.add_phases(["barrier"]), timeout_s=1)
    leave_record(params, phase_idx=0, peer=1, expected=2, seen=1, is_whole=False)
    log.check()
    assert not log.has_record


def test_phase_that_nobody_named_is_told_by_its_number() -> None:
    log = TimeoutLog(rank=0, device=CPU)
    leave_record(log.params(first_phase=7, timeout_s=1), phase_idx=0, peer=1, expected=2, seen=1)
    with pytest.raises(CommTimeoutError, match=r"^phase 7: rank 0"):
        log.check()


def test_same_phases_share_a_number_and_others_do_not() -> None:
    log = TimeoutLog(rank=0, device=CPU)
    first = log.add_phases(["a", "b"])
    second = log.add_phases(["b", "c"])
    assert second == first + 2
    assert log.add_phases(["a", "b"]) == first
    assert log.add_phases(["d"]) == second + 2


@pytest.mark.parametrize(("timeout_s", "wanted_ns"), [(1, 10**9), (0.25, 250_000_000), (1e-12, 1), (100.0, 10**11)])
def test_timeout_is_counted_in_nanoseconds_rounded_up(timeout_s: float, wanted_ns: int) -> None:
    assert timeout_to_ns(timeout_s) == wanted_ns


@pytest.mark.parametrize("timeout_s", [0, -1.0, math.nan, math.inf, 1e12, 2**63 / 1e9])
def test_timeout_that_device_code_cannot_count_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="above 0 and at most 9223372036 seconds"):
        TimeoutLog(rank=0, device=CPU).params(first_phase=0, timeout_s=timeout_s)
