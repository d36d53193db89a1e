"""Signals between streams, over a driver whose streams are simulated; `device/check_signals.py` does it on a GPU."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from signal_fake import FakeDriver, Status

from deep_ep_core import copy_engine, signal_device
from deep_ep_core.errors import CommTimeoutError, ConfigError, TransportError
from deep_ep_core.jit import driver as driver_module
from deep_ep_core.stream_signals import Awaited, StreamSignals

DEVICE = torch.device("cuda", 0)
SHORT_S = 0.05
LONG_S = 3600.0
STREAM, OTHER_STREAM = 5, 6
WORD, OTHER_WORD = 0x1000, 0x1008


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    for module in (driver_module, signal_device, copy_engine):
        monkeypatch.setattr(module, "load_driver", lambda: fake)
    copy_engine._find_batch_call.cache_clear()
    # Words of one fake are none of another's.
    monkeypatch.setattr(signal_device, "_spare_host_words", [])
    return fake


@contextlib.contextmanager
def open_signals(timeout_s: float = LONG_S) -> Iterator[StreamSignals]:
    signals = StreamSignals(DEVICE, rank=1, timeout_s=timeout_s, name="Owner")
    yield signals
    # Not after a failure: a stream that is not set free would hold the test up.
    signals.close()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at, "nothing happened in 20 s"
        time.sleep(0.002)


def expired(signals: StreamSignals) -> CommTimeoutError:
    """The error of `check`, once there is one."""
    found: list[CommTimeoutError] = []

    def try_check() -> bool:
        try:
            signals.check()
        except CommTimeoutError as error:
            found.append(error)
        return bool(found)

    wait_until(try_check)
    return found[0]


def test_stream_goes_on_once_another_stream_has_written_the_value(driver: FakeDriver) -> None:
    with open_signals() as signals:
        signals.wait(STREAM, WORD, 3, peer=2, phase="gather")
        signals.write(OTHER_STREAM, WORD, 2)
        assert not driver.is_idle(STREAM)
        signals.write(OTHER_STREAM, WORD, 3)
        assert driver.is_idle(STREAM)
        signals.check()


def test_words_are_written_in_their_order(driver: FakeDriver) -> None:
    with open_signals() as signals:
        signals.write_all(STREAM, [(WORD, 1), (OTHER_WORD, 5), (WORD, 2)])
        assert driver.words == {WORD: 2, OTHER_WORD: 5}


def test_late_peer_is_named_with_what_was_expected_and_seen(driver: FakeDriver) -> None:
    driver.peer_writes(WORD, 6)
    with open_signals(SHORT_S) as signals:
        signals.wait(STREAM, WORD, 7, peer=2, phase="gather 4")
        error = expired(signals)
    assert (error.phase, error.rank, error.peers, error.expected, error.seen) == ("gather 4", 1, (2,), 7, 6)
    assert "Owner: gather 4: rank 1 waited 0.05 s for rank 2, which must come to 7 and was at 6;" in str(error)


def test_streams_are_set_free_and_every_later_call_raises(driver: FakeDriver) -> None:
    with open_signals(SHORT_S) as signals:
        signals.wait(STREAM, WORD, 1, peer=2, phase="first")
        signals.wait(STREAM, WORD, 2, peer=2, phase="second")
        signals.wait(OTHER_STREAM, OTHER_WORD, 9, peer=0, phase="third")
        expired(signals)
        wait_until(lambda: driver.is_idle(STREAM) and driver.is_idle(OTHER_STREAM))
        for call in (
            lambda: signals.write(STREAM, WORD, 3),
            lambda: signals.wait(STREAM, WORD, 3, peer=2, phase="later"),
            signals.check,
            signals.check,
        ):
            with pytest.raises(CommTimeoutError):
                call()
        assert driver.is_idle(STREAM), "a refused call must enqueue nothing"


def test_late_peer_that_sets_the_word_back_does_not_hold_later_waits(driver: FakeDriver) -> None:
    with open_signals(SHORT_S) as signals:
        signals.wait(STREAM, WORD, 1, peer=2, phase="first")
        work = driver.busy(STREAM)
        signals.wait(STREAM, WORD, 2, peer=2, phase="second")
        expired(signals)
        wait_until(lambda: driver.words[WORD] == 2)
        driver.peer_writes(WORD, 1)
        work.set()
        wait_until(lambda: driver.is_idle(STREAM))


def test_deadline_counts_from_when_the_stream_reaches_the_wait(driver: FakeDriver) -> None:
    work = driver.busy(STREAM)
    with open_signals(SHORT_S) as signals:
        signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
        time.sleep(6 * SHORT_S)
        signals.check()
        work.set()
        assert expired(signals).peers == (2,)


def test_deadline_is_that_of_each_wait_and_not_of_the_stream(driver: FakeDriver) -> None:
    """Waits that follow each other may take longer in all than one of them may."""
    timeout_s = 2.0
    with open_signals(timeout_s) as signals:
        for value in (1, 2, 3):
            signals.wait(STREAM, WORD, value, peer=2, phase="gather")
        for value in (1, 2, 3):
            time.sleep(0.4 * timeout_s)
            driver.peer_writes(WORD, value)
        wait_until(lambda: driver.is_idle(STREAM))
        signals.check()


def test_all_late_peers_of_a_common_wait_are_named_and_no_other(driver: FakeDriver) -> None:
    words = [Awaited(WORD + 8 * peer, 4, peer) for peer in (0, 2, 3)]
    driver.peer_writes(WORD + 16, 4)
    with open_signals(SHORT_S) as signals:
        signals.wait_all(STREAM, words, phase="gather")
        error = expired(signals)
        wait_until(lambda: driver.is_idle(STREAM))
    assert error.peers == (0, 3)
    assert "(late too: rank 3)" in str(error)


def test_streams_are_set_free_while_another_thread_holds_up_all_copies(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `cudaFree` does, until the device is idle: words cannot be read, and all awaited ranks are named."""
    monkeypatch.setattr(signal_device, "_COPY_TIMEOUT_S", 0.05)
    words = [Awaited(WORD, 4, 0), Awaited(OTHER_WORD, 4, 2)]
    with open_signals(SHORT_S) as signals:
        signals.wait_all(STREAM, words, phase="gather")
        driver.copies_may_start.clear()
        wait_until(lambda: driver.is_idle(STREAM))
        error = expired(signals)
        assert (error.peers, error.seen) == ((0, 2), None)
        assert "was at an unknown place, as words could not be read (late too, perhaps: rank 2);" in str(error)
        driver.copies_may_start.set()


@pytest.mark.parametrize("held_up", [[0], [1], [0, 1]])
def test_streams_are_set_free_where_writes_are_held_up(driver: FakeDriver, held_up: list[int]) -> None:
    """As in a queue of the hardware that a waiting stream holds; where both are, by copies."""
    with open_signals(SHORT_S) as signals:
        for idx in held_up:
            driver.hold_up_private(idx)
        signals.wait(STREAM, WORD, 1, peer=2, phase="first")
        signals.wait(STREAM, OTHER_WORD, 5, peer=2, phase="second")
        assert expired(signals).peers == (2,)
        wait_until(lambda: driver.is_idle(STREAM))


def test_wait_for_no_word_is_none(driver: FakeDriver) -> None:
    with open_signals() as signals:
        signals.wait_all(STREAM, [], phase="gather")
    assert driver.num_events == 0


def test_values_wrap_around(driver: FakeDriver) -> None:
    driver.peer_writes(WORD, 2**64 - 1)
    with open_signals(SHORT_S) as signals:
        signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
        error = expired(signals)
        assert error.seen == 2**64 - 1
    with open_signals() as signals:
        driver.peer_writes(WORD, 0)
        signals.wait(STREAM, WORD, 2**64 - 1, peer=2, phase="gather")
        assert driver.is_idle(STREAM)


def test_capture_is_refused_before_anything_is_enqueued(driver: FakeDriver) -> None:
    driver.captured.add(STREAM)
    with open_signals() as signals:
        with pytest.raises(ConfigError, match="Owner must not be captured in a CUDA graph"):
            signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
        with pytest.raises(ConfigError, match="outside of the capture"):
            signals.write(STREAM, WORD, 1)
        assert (driver.num_events, driver.words) == (0, {})


def test_legacy_default_stream_is_used_without_asking_about_a_capture(driver: FakeDriver) -> None:
    with open_signals() as signals:
        signals.write(0, WORD, 1)
        signals.wait(0, WORD, 1, peer=2, phase="gather")
        assert driver.is_idle(0)


def test_events_are_used_again(driver: FakeDriver) -> None:
    with open_signals() as signals:
        for value in range(1, 1001):
            signals.write(OTHER_STREAM, WORD, value)
            signals.wait(STREAM, WORD, value, peer=2, phase="gather")
        assert driver.num_events < 300


def test_no_thread_runs_before_the_first_wait(driver: FakeDriver) -> None:
    before = threading.active_count()
    with open_signals() as signals:
        signals.write(STREAM, WORD, 1)
        assert threading.active_count() == before
        signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_close_returns_once_the_streams_are_through(driver: FakeDriver) -> None:
    signals = StreamSignals(DEVICE, rank=1, timeout_s=LONG_S, name="Owner")
    signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
    closer = threading.Thread(target=signals.close)
    closer.start()
    assert driver.num_released == 0
    driver.peer_writes(WORD, 1)
    closer.join(20)
    assert not closer.is_alive()
    signals.close()
    assert driver.num_released == 1
    with pytest.raises(ConfigError, match="signals of Owner must be open"):
        signals.write(STREAM, WORD, 2)


def test_abandoned_streams_go_on_and_nothing_has_expired(driver: FakeDriver) -> None:
    with open_signals() as signals:
        signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
        work = driver.busy(OTHER_STREAM)
        signals.wait(OTHER_STREAM, OTHER_WORD, 4, peer=2, phase="gather")
        signals.abandon()
        wait_until(lambda: driver.is_idle(STREAM))
        driver.peer_writes(OTHER_WORD, 3)
        work.set()
        wait_until(lambda: driver.is_idle(OTHER_STREAM))
        signals.check()
        with pytest.raises(ConfigError, match="signals of Owner must be open"):
            signals.wait(STREAM, WORD, 2, peer=2, phase="gather")


def test_close_after_an_expiry_gives_everything_back(driver: FakeDriver) -> None:
    signals = StreamSignals(DEVICE, rank=1, timeout_s=SHORT_S, name="Owner")
    signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
    expired(signals)
    signals.close()
    assert driver.is_idle(STREAM)
    assert driver.num_released == 1


def test_dropped_signals_go_once_their_waits_are_over(driver: FakeDriver) -> None:
    signals = StreamSignals(DEVICE, rank=1, timeout_s=LONG_S, name="Owner")
    signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
    del signals
    gc.collect()
    assert driver.num_released == 0
    driver.peer_writes(WORD, 1)
    wait_until(lambda: driver.num_released == 1)


def test_lost_device_ends_the_watch_and_close_still_returns(
    driver: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    with open_signals() as signals:
        driver.query_status = Status.CUDA_ERROR_ILLEGAL_ADDRESS
        signals.wait(STREAM, WORD, 1, peer=2, phase="gather")
    assert "Owner signals, rank 1 ended: cuEventQuery failed: CUDA_ERROR_ILLEGAL_ADDRESS" in caplog.text


def test_device_without_such_operations_is_refused(driver: FakeDriver) -> None:
    driver.has_words = False
    with pytest.raises(TransportError, match="memory operations of 64 bits in streams"):
        StreamSignals(DEVICE, rank=1, timeout_s=1.0, name="Owner")


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("nan"), float("inf")])
def test_timeout_must_be_a_span(driver: FakeDriver, timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="timeout must be above 0"):
        StreamSignals(DEVICE, rank=1, timeout_s=timeout_s, name="Owner")
