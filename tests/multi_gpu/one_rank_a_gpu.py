"""Owns a pytest plugin for machines with several GPUs: tests run only where each of their ranks has its own GPU.

usage: pytest -p one_rank_a_gpu -m gpu --gpu-ranks N [--outcomes PATH], with this folder in PYTHONPATH

A test that asks `gpu_rank_pool` for another number of ranks than N is skipped: its ranks would share GPUs, or leave
some idle, which the run with that number is for. With --outcomes each test leaves a line of JSON as soon as it has
ended, so that a run which is cut off tells what it did.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

OTHER_NUMBER = "for another number of ranks than there are GPUs in this run"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="PATH", help="write a JSON line a test: name, outcome, seconds, reason")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path:
        config.pluginmanager.register(OutcomeLog(Path(path)), "outcome_log")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    value = yield
    if fixturedef.argname != "gpu_rank_pool":
        return value
    pools = OneRankAGpu(value, int(request.config.getoption("--gpu-ranks")))
    # Other tests of the session take it from there.
    assert fixturedef.cached_result is not None
    fixturedef.cached_result = (pools, fixturedef.cached_result[1], None)
    return pools


class OneRankAGpu:
    """Stands before the fixture `gpu_rank_pool`: lets calls for one number of ranks through, and skips their test else.

    Args:
        pools: What the fixture gave.
        num_ranks: The number.
    """

    def __init__(self, pools: Callable[..., Any], num_ranks: int) -> None:
        self._pools = pools
        self._num_ranks = num_ranks

    def __call__(self, num_ranks: int, *args: Any, **kwargs: Any) -> Any:
        if num_ranks != self._num_ranks:
            pytest.skip(f"{OTHER_NUMBER}: {num_ranks}, not {self._num_ranks}")
        return self._pools(num_ranks, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pools, name)


class OutcomeLog:
    """Writes a line as each test ends.

    Args:
        path: The file; it is begun anew.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("", encoding="utf-8")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test's body says how it went; before and behind it only what went wrong counts, and a skip.
        if report.when != "call" and report.outcome == "passed":
            return
        skip = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        reason = skip if report.outcome == "skipped" else _errors_of(report.longreprtext)
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "reason": reason.removeprefix("Skipped: "),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _errors_of(text: str) -> str:
    """The lines of a traceback that name the error: the first, and the last, where what failed in a rank ends."""
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ") and line[1:].strip()]
    if not errors:
        return (text.splitlines() or [""])[-1]
    return errors[0] if len(errors) == 1 else f"{errors[0]} ... {errors[-1]}"
