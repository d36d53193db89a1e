"""What the barrier's host side hands to its kernel. The kernel itself is run by gpu_check.py."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep_core import barrier
from deep_ep_core.barrier import LSA_BARRIER_SLOT_BYTES, LsaBarrier, lsa_barrier_spec
from deep_ep_core.errors import ConfigError, TopologyError
from deep_ep_core.lsa_team import MAX_LSA_RANKS, LsaMemory, make_lsa_team
from deep_ep_core.wait import TimeoutLog

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@dataclass
class FakeMemory:
    """Windows a TiB apart, as rank `lsa_rank` of the team sees them."""

    num_ranks: int
    lsa_rank: int
    device: torch.device = GPU

    @property
    def address(self) -> int:
        return (self.lsa_rank + 1) << 40

    def lsa_addresses(self) -> tuple[int, ...]:
        return tuple((lsa_rank + 1) << 40 for lsa_rank in range(self.num_ranks))


class FakeLaunch:
    """Keeps what it is made with and called with."""

    def __init__(self, kernel: Any, shape: Any) -> None:
        self.shape = shape
        self.calls: list[tuple[Any, int]] = []

    def __call__(self, params: Any, stream: int) -> None:
        self.calls.append((params, stream))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(barrier, "get_kernel", lambda spec, device_idx, builder: SimpleNamespace(spec=spec))
    monkeypatch.setattr(barrier, "PreparedLaunch", FakeLaunch)


def make_barrier(memory: LsaMemory, *, slot_offset: int = 256, rank: int = 13) -> LsaBarrier:
    log = TimeoutLog(rank=rank, device=CPU)
    return LsaBarrier(memory, slot_offset=slot_offset, rank=rank, log=log, timeout_s=2.0)


@pytest.mark.usefixtures("without_gpu")
def test_kernel_is_told_who_is_who() -> None:
    """Rank 13 is the sixth of the second team of eight."""
    made = make_barrier(FakeMemory(num_ranks=8, lsa_rank=5))
    team, wait = made.params.team, made.params.wait
    assert (team.rank, team.num_ranks, team.first_rank) == (5, 8, 8)
    assert list(team.windows)[:8] == [(place + 1) << 40 for place in range(8)]
    assert not any(list(team.windows)[8:])
    assert (wait.rank, wait.timeout_ns) == (13, 2 * 10**9)
    assert made.params.slot_offset == 256
    assert repr(made) == "LsaBarrier(rank 13, LSA team of 8, cuda:0)"


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize(("num_ranks", "num_threads"), [(1, 32), (32, 32), (33, 64), (MAX_LSA_RANKS, 96)])
def test_block_has_a_thread_a_peer(num_ranks: int, num_threads: int) -> None:
    made: Any = make_barrier(FakeMemory(num_ranks=num_ranks, lsa_rank=0))
    assert made._launch.shape.grid == (1, 1, 1)
    assert made._launch.shape.block == (num_threads, 1, 1)
    assert num_threads <= lsa_barrier_spec().max_threads_per_block


@pytest.mark.usefixtures("without_gpu")
def test_barrier_goes_into_the_given_stream() -> None:
    made: Any = make_barrier(FakeMemory(num_ranks=2, lsa_rank=1))
    made.enqueue(SimpleNamespace(cuda_stream=77))
    assert made._launch.calls == [(made.params, 77)]


def test_slots_share_no_cache_line() -> None:
    assert LSA_BARRIER_SLOT_BYTES % 128 == 0
    assert LSA_BARRIER_SLOT_BYTES >= 8 * (MAX_LSA_RANKS + 1)


@pytest.mark.usefixtures("without_gpu")
@pytest.mark.parametrize("slot_offset", [-8, 4, 257])
def test_offset_that_splits_a_word_is_refused(slot_offset: int) -> None:
    with pytest.raises(ConfigError, match=rf"multiple of 8 bytes \(got {slot_offset} on rank 13\)"):
        make_barrier(FakeMemory(num_ranks=2, lsa_rank=1), slot_offset=slot_offset)


def test_team_that_kernels_cannot_hold_is_refused() -> None:
    with pytest.raises(TopologyError, match=r"at most 72 ranks \(got 73 on rank 3\); set NCCL_LSA_TEAM_SIZE"):
        make_lsa_team(FakeMemory(num_ranks=MAX_LSA_RANKS + 1, lsa_rank=3), rank=3)


def test_memory_of_a_team_without_this_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"must include this rank's own, 0x50000000000 \(got 0x10000000000, 0x2"):
        make_lsa_team(FakeMemory(num_ranks=2, lsa_rank=4), rank=4)
