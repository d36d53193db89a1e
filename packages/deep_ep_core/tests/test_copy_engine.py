"""Copies in one batch: which calls of the driver they become. `device/check_signals.py` runs them on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from signal_fake import FakeDriver

from deep_ep_core import copy_engine
from deep_ep_core.copy_engine import Copy, copy_batch

COPIES = [Copy(100, 200, 32), Copy(300, 400, 0), Copy(500, 600, 1)]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(copy_engine, "load_driver", lambda: fake)
    copy_engine._find_batch_call.cache_clear()
    return fake


def test_batch_is_one_call_in_stream_order_that_leaves_the_sms_alone(driver: FakeDriver) -> None:
    copy_batch(7, COPIES)
    attributes = SimpleNamespace(srcAccessOrder="stream order", flags=1)
    assert driver.copies == [("batch", [100, 500], [200, 600], [32, 1], 2, [attributes], [0], 1, 7)]


def test_older_driver_gets_one_call_a_copy(driver: FakeDriver) -> None:
    driver.version = 12080
    copy_batch(7, COPIES)
    assert driver.copies == [("single", 7, 100, 200, 32), ("single", 7, 500, 600, 1)]


def test_legacy_default_stream_gets_one_call_a_copy(driver: FakeDriver) -> None:
    copy_batch(0, COPIES)
    assert [copy[:2] for copy in driver.copies] == [("single", 0), ("single", 0)]


def test_single_copy_is_no_batch(driver: FakeDriver) -> None:
    copy_batch(7, COPIES[:2])
    assert driver.copies == [("single", 7, 100, 200, 32)]


@pytest.mark.parametrize("copies", [[], [Copy(1, 2, 0)]])
def test_nothing_to_move_is_no_call(driver: FakeDriver, copies: list[Copy]) -> None:
    copy_batch(7, copies)
    assert driver.copies == []
