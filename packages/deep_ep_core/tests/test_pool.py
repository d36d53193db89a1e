from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankFailedError
from deep_ep_core.local import RankPool, pool

HOLD_POOL = str(Path(__file__).parent / "programs" / "hold_pool.py")


@dataclass(frozen=True)
class Parcel:
    """A class that only this module knows."""

    content: torch.Tensor


class OddError(Exception):
    def __init__(self) -> None:
        super().__init__("odd")
        self.number = 3
        self.parcel = Parcel(torch.arange(2))
        self.unpicklable = lambda: None


def rank_and_pid() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def gathered(offset: int, *, scale: int) -> list[int]:
    parts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, torch.tensor([offset + scale * dist.get_rank()]))
    return [int(part) for part in parts]


def team_size() -> str | None:
    return os.environ.get("NCCL_LSA_TEAM_SIZE")


def doubled(parcel: Parcel) -> Parcel:
    return Parcel(parcel.content * 2)


def say(text: str) -> None:
    for _ in range(20_000):
        print(text)


def raise_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} does not like this")
    return dist.get_rank()


def raise_late_peer() -> None:
    raise CommTimeoutError("peer 1 is late", phase="dispatch #2: payload", rank=dist.get_rank(), peers=[1])


def raise_odd() -> None:
    raise OddError


def raise_on_while_peers_wait(rank: int) -> None:
    raise_on(rank)
    dist.barrier()


def kill_on(rank: int) -> str:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def leave() -> None:
    sys.exit("no more of this")


def exit_on(rank: int, code: int) -> None:
    if dist.get_rank() == rank:
        os._exit(code)


def hang_on(rank: int) -> None:
    while dist.get_rank() == rank:
        time.sleep(1)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_results_come_by_rank_from_the_same_processes(rank_pool):
    ranks = rank_pool(2)
    first = ranks.run(rank_and_pid)
    assert first == [(0, ranks.pids[0]), (1, ranks.pids[1])]
    assert ranks.run(rank_and_pid) == first
    assert rank_pool(2) is ranks


def test_default_group_is_ready_and_arguments_arrive(rank_pool):
    assert rank_pool(2).run(gathered, 5, scale=10) == [[5, 15], [5, 15]]


def test_nodes_set_the_team_size_of_the_ranks(rank_pool):
    assert rank_pool(2, num_nodes=2).run(team_size) == ["1", "1"]


def test_function_of_an_importable_module_runs(rank_pool):
    ranks = rank_pool(2)
    assert ranks.run(os.getpid) == ranks.pids
    assert ranks.run(dist.get_rank) == [0, 1]


def test_large_tensors_and_classes_of_a_test_module_travel(rank_pool):
    content = torch.arange(1_000_000)
    for parcel in rank_pool(2).run(doubled, Parcel(content)):
        assert type(parcel) is Parcel
        assert torch.equal(parcel.content, content * 2)


def test_all_printed_lines_arrive_before_the_run_returns(rank_pool, capsys):
    rank_pool(2).run(say, "hello there")
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("[rank 0] hello there") == lines.count("[rank 1] hello there") == 20_000


def test_exception_names_its_rank_and_leaves_the_pool_usable(rank_pool):
    ranks = rank_pool(2)
    pids = ranks.pids
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed: ValueError: rank 1 does not like this") as caught:
        ranks.run(raise_on, 1)
    assert caught.value.rank == 1
    assert "in raise_on" in str(caught.value)
    assert "in raise_on" in caught.value.traceback_text
    assert not ranks.is_broken
    assert ranks.run(raise_on, -1) == [0, 1]
    assert ranks.pids == pids


def test_run_catching_reports_every_rank(rank_pool):
    fine, failed = rank_pool(2).run_catching(raise_on, 1)
    assert (fine.rank, fine.value, fine.is_failure) == (0, 0, False)
    assert (failed.rank, failed.error_type_name, failed.died) == (1, "ValueError", False)
    assert failed.error_message == "rank 1 does not like this"
    assert failed.traceback_text.rstrip().endswith("ValueError: rank 1 does not like this")


def test_error_attributes_that_can_be_pickled_arrive(rank_pool):
    late = rank_pool(2).run_catching(raise_late_peer)[1]
    assert late.error_type_name == "CommTimeoutError"
    assert (late.error_attributes["phase"], late.error_attributes["peers"]) == ("dispatch #2: payload", (1,))
    odd = rank_pool(2).run_catching(raise_odd)[0]
    assert odd.error_attributes["number"] == 3
    assert type(odd.error_attributes["parcel"]) is Parcel
    assert "unpicklable" not in odd.error_attributes


def test_sys_exit_is_an_exception_like_others(rank_pool):
    ranks = rank_pool(2)
    assert [outcome.error_type_name for outcome in ranks.run_catching(leave)] == ["SystemExit"] * 2
    assert not ranks.is_broken


def test_what_cannot_travel_is_refused_before_any_rank_runs(rank_pool):
    ranks = rank_pool(2)
    with pytest.raises(ConfigError, match="top level of a module"):
        ranks.run(lambda: None)
    with pytest.raises(ConfigError, match="must be picklable"):
        ranks.run(doubled, lambda: None)
    assert not ranks.is_broken


def test_killed_rank_breaks_the_pool_until_it_is_restarted(rank_pool):
    ranks = rank_pool(2)
    pids = ranks.pids
    survivor, dead = ranks.run_catching(kill_on, 1)
    assert (survivor.value, survivor.died) == ("alive", False)
    assert (dead.died, dead.exit_signal, dead.exit_code) == (True, "SIGKILL", None)
    assert ranks.is_broken
    assert not any(map(exists, pids)), "a broken pool keeps no process"
    with pytest.raises(RankFailedError, match=r"broken, since rank 1 died: killed by SIGKILL; call restart"):
        ranks.run(rank_and_pid)
    ranks.restart()
    assert not set(ranks.pids) & set(pids)
    assert ranks.run(rank_and_pid) == list(enumerate(ranks.pids))


def test_rank_that_leaves_its_process_is_reported_with_its_exit_code(rank_pool):
    ranks = rank_pool(2)
    with pytest.raises(RankFailedError, match="rank 0 of 2 failed: exit code 3"):
        ranks.run(exit_on, 0, 3)
    assert ranks.is_broken


def test_rank_that_dies_between_runs_breaks_the_pool(rank_pool):
    ranks = rank_pool(2)
    os.kill(ranks.pids[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not ranks.is_broken:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RankFailedError, match="rank 0 ended between runs: killed by SIGKILL"):
        ranks.run(rank_and_pid)


def test_timeout_names_the_stuck_rank_and_shows_its_stack(rank_pool):
    ranks = rank_pool(2)
    pids = ranks.pids
    with pytest.raises(RankFailedError, match="rank 1 still ran after") as caught:
        ranks.run(hang_on, 1, timeout_s=2)
    assert caught.value.rank == 1
    assert "in hang_on" in caught.value.traceback_text
    assert "stack of rank 0" not in str(caught.value)
    assert ranks.is_broken
    assert not any(map(exists, pids))


def test_failure_is_reported_although_a_peer_waits_for_the_rank(rank_pool, monkeypatch):
    monkeypatch.setattr(pool, "_AFTER_FAILURE_S", 1.0)
    with pytest.raises(RankFailedError, match="rank 0 of 2 failed: ValueError") as caught:
        rank_pool(2).run(raise_on_while_peers_wait, 0)
    assert "rank 1 still ran after" in str(caught.value)
    assert "in raise_on_while_peers_wait" in str(caught.value)


def test_closed_pool_leaves_no_process_and_says_that_it_is_closed():
    with RankPool(1) as ranks:
        pids = ranks.pids
        assert all(map(exists, pids))
    assert not any(map(exists, pids))
    ranks.close()
    with pytest.raises(ConfigError, match="got a closed one"):
        ranks.run(rank_and_pid)


def test_ranks_do_not_outlive_a_killed_parent():
    with subprocess.Popen([sys.executable, HOLD_POOL], stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(parent.stdout.readline().split()[-1]) for _ in range(2)]
            assert all(map(exists, pids))
        finally:
            parent.kill()
    deadline = time.monotonic() + 60
    while any(exists(pid) and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its parent"
        time.sleep(0.02)
