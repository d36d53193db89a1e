"""Owns how the benchmark takes time: rounds of a call, of its baseline, and of a copy, on ranks that begin together."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deep_ep_cp.bench.cases import DTYPE, Case
from deep_ep_cp.buffer import ContextBuffer

__all__ = ["Session", "Spread", "make_call", "measure_baseline", "measure_call", "measure_copy_gbs"]

_COPY_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
_COPY_ROUNDS = 20
_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
# Holds a stream back until the host has enqueued a round, so that the host's time is not in it.
_HEAD_START_CYCLES = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """Where a run takes place.

    Attributes:
        group: Carries the baseline, and the calls on the collective backend.
        host_group: A gloo group of the same ranks.
        device: Device of this rank.
        device_of_rank: What tells the ranks' devices apart.
        num_rounds, num_warmup: Rounds that count, and rounds before them.
    """

    group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    device: torch.device
    device_of_rank: Sequence[str]
    num_rounds: int
    num_warmup: int

    @property
    def num_ranks_of_device(self) -> int:
        """Ranks of the device that has most."""
        return max(self.device_of_rank.count(name) for name in self.device_of_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Times of the slowest rank of each round."""

    median_ms: float
    min_ms: float
    max_ms: float


def make_call(case: Case, buffer: ContextBuffer, device: torch.device) -> Callable[[], None]:
    """The call of a case, in a session that is open, up to where the caller's stream may use its results."""
    own = torch.full((case.num_elements,), buffer.rank_idx + 1, dtype=DTYPE, device=device)
    addends = own.expand(case.num_ranks, -1).contiguous() if case.op == "reduce_scatter" else None

    def call() -> None:
        if addends is not None:
            _, wait = buffer.reduce_scatter(addends)
        elif case.op == "all_gather_in_place":
            _, wait = buffer.all_gather(buffer.agrs_get_inplace_tensor((case.num_elements,), DTYPE))
        else:
            _, wait = buffer.all_gather(own)
        wait()

    return call


def measure_call(case: Case, buffer: ContextBuffer, session: Session) -> Spread:
    """Time a case, one session a round; the end of the session is not in it. Collective: yes."""
    call = make_call(case, buffer, session.device)
    small = torch.zeros(1, dtype=torch.uint8, device=session.device)

    def meet() -> None:
        buffer.create_agrs_session()
        buffer.all_gather(small)[1]()

    return _measure(meet, call, buffer.destroy_agrs_session, session)


def measure_baseline(case: Case, session: Session) -> Spread:
    """Time the same with the collectives of torch. Collective: yes."""
    own = torch.ones(case.num_elements, dtype=DTYPE, device=session.device)
    all_of_them = torch.ones(case.num_ranks * case.num_elements, dtype=DTYPE, device=session.device)
    small = torch.zeros(1, device=session.device)

    def call() -> None:
        if case.op == "reduce_scatter":
            dist.reduce_scatter_tensor(own, all_of_them, group=session.group)
        else:
            dist.all_gather_into_tensor(all_of_them, own, group=session.group)

    return _measure(lambda: dist.all_reduce(small, group=session.group), call, lambda: None, session)


def measure_copy_gbs(session: Session) -> float:
    """GB/s of a copy on a device, read plus write, by one of its ranks: the best round of the slowest device.

    Collective: yes.
    """
    rank = dist.get_rank(session.host_group)
    is_copying = session.device.type == "cpu" or session.device_of_rank.index(session.device_of_rank[rank]) == rank
    num_bytes = _COPY_BYTES[session.device.type]
    source = torch.ones(num_bytes if is_copying else 0, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)
    times_ms = []
    for _ in range(_COPY_ROUNDS):
        _meet_on_host(session)
        times_ms.append(_time(lambda: target.copy_(source), session.device))
    best = torch.tensor(min(times_ms) if is_copying else 0.0)
    dist.all_reduce(best, dist.ReduceOp.MAX, group=session.host_group)
    return 2 * num_bytes / _BYTES_PER_GB / (float(best) / _MS_PER_S)


def _measure(
    meet: Callable[[], object], call: Callable[[], object], end: Callable[[], object], session: Session
) -> Spread:
    times_ms = []
    for _ in range(session.num_warmup + session.num_rounds):
        _meet_on_host(session)
        if session.device.type == "cuda":
            torch.cuda._sleep(_HEAD_START_CYCLES)
        # The streams begin together, much closer than hosts can.
        meet()
        times_ms.append(_time(call, session.device))
        end()
    slowest = torch.tensor(times_ms[session.num_warmup :], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX, group=session.host_group)
    values = slowest.tolist()
    return Spread(median_ms=statistics.median(values), min_ms=min(values), max_ms=max(values))


def _meet_on_host(session: Session) -> None:
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    dist.barrier(session.host_group)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds on the device, or of the host where that is the device."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * _MS_PER_S
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
