"""The plugin, played by a driver in C that calls its table as NCCL does, from one process a rank.

`kind="cuda"` runs the layer for GPUs against a stand-in for the driver's library, whose copies run late.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deep_ep_core.loopback import PeerCounts, read_counters

RunDriver = Callable[..., "subprocess.CompletedProcess[str]"]

KINDS = ("host", "cuda")
pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_puts_and_gets_of_every_size_arrive(run_driver: RunDriver, kind: str, num_ranks: int) -> None:
    """From nothing to 64 MiB (16 MiB with four ranks), at and around the sizes at which copies are cut."""
    run_driver("sizes", kind=kind, num_ranks=num_ranks, window_bytes=(64 << 20) if num_ranks == 2 else (16 << 20))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_thousands_of_random_puts_follow_the_rules_of_signals(run_driver: RunDriver, kind: str, num_ranks: int) -> None:
    run_driver("random", kind=kind, num_ranks=num_ranks, num_rounds=20, window_bytes=1 << 18)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_rules_of_signals_hold_under_delay_and_reordering(run_driver: RunDriver, kind: str, seed: int) -> None:
    faults = {"EP_LOOPBACK_REORDER": seed, "EP_LOOPBACK_DELAY_US": 300}
    run_driver("random", kind=kind, num_ranks=3, seed=seed, num_rounds=15, window_bytes=1 << 18, **faults)


@pytest.mark.parametrize("kind", KINDS)
def test_flush_is_done_after_the_gets_before_it(run_driver: RunDriver, kind: str) -> None:
    run_driver("gets", kind=kind, num_rounds=100)
    run_driver("gets", kind=kind, num_rounds=100, EP_LOOPBACK_REORDER=4, EP_LOOPBACK_DELAY_US=300)


def test_payloads_larger_than_a_slot_are_held_up_too(run_driver: RunDriver) -> None:
    run_driver("random", num_ranks=2, num_rounds=3, window_bytes=24 << 20, EP_LOOPBACK_REORDER=7)


def test_reordering_lets_messages_overtake_and_order_is_kept_without(run_driver: RunDriver) -> None:
    overtaken = re.compile(r"overtaken (\d+)")
    calm = overtaken.search(run_driver("reordered", num_rounds=30).stdout)
    wild = overtaken.search(run_driver("reordered", num_rounds=30, EP_LOOPBACK_REORDER=3).stdout)
    assert calm is not None
    assert wild is not None
    assert int(calm[1]) == 0
    assert int(wild[1]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_delayed_put_is_done_with_its_source_before_its_data_arrives(run_driver: RunDriver, kind: str) -> None:
    """Code that takes the local end of a put for its arrival works on most networks, most of the time."""
    run_driver("early", kind=kind, num_rounds=2, EP_LOOPBACK_DELAY_US=1_000_000)


@pytest.mark.parametrize("kind", KINDS)
def test_silent_rank_reaches_nobody_and_the_others_go_on(run_driver: RunDriver, kind: str) -> None:
    run_driver("silent", kind=kind, num_ranks=3, num_rounds=5, EP_LOOPBACK_DROP_RANK=2, EP_LOOPBACK_DROP_AFTER=5)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_to_a_killed_rank_never_complete_and_the_others_go_on(run_driver: RunDriver, kind: str) -> None:
    log = run_driver("dead", kind=kind, num_ranks=3).stderr
    assert "the process of rank 2 has ended" in log


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_valid_is_refused(run_driver: RunDriver, kind: str) -> None:
    log = run_driver("misuse", kind=kind).stderr
    assert "there are 3 contexts and 2 ranks" in log
    assert "must be an aligned word" in log


def test_driver_that_refuses_copy_engines_is_done_without(run_driver: RunDriver) -> None:
    log = run_driver("sizes", kind="cuda", window_bytes=4 << 20, FAKE_CUDA_REFUSES_BATCHES=1).stderr
    assert "copies are asked of the driver's choice" in log


def test_counters_tell_messages_and_bytes_by_peer(run_driver: RunDriver, tmp_path: Path) -> None:
    run_driver("counted", num_ranks=3, EP_LOOPBACK_COUNTERS=tmp_path)
    counters = read_counters(tmp_path)
    assert sorted(counters) == [0, 1, 2]
    for counts in counters.values():
        for peer, count in enumerate(counts):
            # Two puts bear a signal; the meeting at the end is one more, without payload.
            assert count == PeerCounts(
                num_puts=5 + peer,
                put_bytes=100 * (3 + peer) + 16,
                num_signals=3,
                num_gets=1,
                get_bytes=4096,
                num_flushes=1,
            )


def test_counts_of_two_connections_of_a_rank_are_summed(run_driver: RunDriver, tmp_path: Path) -> None:
    run_driver("counted", EP_LOOPBACK_COUNTERS=tmp_path)
    once = read_counters(tmp_path)
    run_driver("counted", EP_LOOPBACK_COUNTERS=tmp_path)
    twice = read_counters(tmp_path)
    assert {rank: tuple(count + count for count in counts) for rank, counts in once.items()} == twice
    assert twice[0][1] - once[0][1] == once[0][1]


def test_fault_that_is_no_number_stops_the_connection(plain_build: Path) -> None:
    command = [str(plain_build / "driver"), str(plain_build / "plugin.so"), "sizes", "1", "1", "1", "host", "4096"]
    done = subprocess.run(command, env={"EP_LOOPBACK_DELAY_US": "soon"}, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "EP_LOOPBACK_DELAY_US must be a whole number of at least 0 (got 'soon')" in done.stderr


def test_nothing_is_left_in_shared_memory(run_driver: RunDriver) -> None:
    """The control memory has no name, so that even a killed rank leaves nothing."""
    folder = Path("/dev/shm")
    before = set(folder.iterdir())
    run_driver("dead", num_ranks=3)
    assert not [path for path in set(folder.iterdir()) - before if "loopback" in path.name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", ["sizes", "random", "misuse", "counted"])
def test_no_wrong_memory_access_leak_or_undefined_behaviour(
    run_driver: RunDriver, sanitized_build: Path, kind: str, scenario: str
) -> None:
    arguments = {"kind": kind, "num_ranks": 2, "num_rounds": 4, "window_bytes": 1 << 21, "build": sanitized_build}
    run_driver(scenario, **arguments, UBSAN_OPTIONS="halt_on_error=1")


def test_no_wrong_memory_access_under_faults(run_driver: RunDriver, sanitized_build: Path) -> None:
    faults = {"EP_LOOPBACK_REORDER": 5, "EP_LOOPBACK_DELAY_US": 200, "UBSAN_OPTIONS": "halt_on_error=1"}
    for kind in KINDS:
        run_driver("random", kind=kind, num_rounds=4, window_bytes=1 << 18, build=sanitized_build, **faults)
        run_driver("dead", kind=kind, num_ranks=3, build=sanitized_build, UBSAN_OPTIONS="halt_on_error=1")
