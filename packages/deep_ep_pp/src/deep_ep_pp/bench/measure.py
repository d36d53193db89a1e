"""Owns the taking of time: of steps on all ranks, and of plain copies on the same device in the same run.

A round's time is that of its slowest rank, because a step of a model waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deep_ep_core.copy_engine import Copy, copy_batch

__all__ = ["STEPS_PER_ROUND", "Session", "Spread", "measure_copies", "time_rounds"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
# Ranks begin a round some 0.1 ms apart, which must not count much.
STEPS_PER_ROUND = 10
# With its target more than a cache holds, so that the copy runs at the rate of the memory.
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_COPY_ROUNDS = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """The ranks of one run, and how they measure.

    Attributes:
        group: Whose ranks exchange messages.
        host_group: The same ranks over the CPU, for barriers and for gathering times.
        device: Of this rank.
        device_of_rank: A name for the device of each rank, by rank; ranks of one device share its memory.
        num_rounds: Timed rounds of each case.
        num_warmup: Rounds before them.
    """

    group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    device: torch.device
    device_of_rank: list[str]
    num_rounds: int
    num_warmup: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, least and most over the rounds, of the slowest rank of each, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float


def time_rounds(session: Session, step: Callable[[], object], *, is_host: bool) -> Spread:
    """Time a step, in rounds of `STEPS_PER_ROUND`, on all ranks.

    On CUDA the time runs between two events of the current stream, so it holds what the host takes to enqueue the
    steps where that is longer. On the CPU, and for the host's time, it is that of the calls themselves.

    Args:
        session: The ranks, and how they measure.
        step: What is timed.
        is_host: Take the host's time, not the device's.

    Returns:
        The spread of the time of a step.

    Collective: yes.
    """
    take_time = _time_on_host if is_host or session.device.type == "cpu" else _time_on_cuda
    times_ms = []
    for _ in range(session.num_warmup + session.num_rounds):
        dist.barrier(session.host_group)
        times_ms.append(take_time(step) / STEPS_PER_ROUND)
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
    slowest = _slowest_rank_ms(times_ms[session.num_warmup :], session.host_group)
    return Spread(median_ms=statistics.median(slowest), min_ms=min(slowest), max_ms=max(slowest))


def measure_copies(session: Session) -> tuple[float, float | None]:
    """The rates at which a device copies its own memory, in GB/s (1e9 bytes), bytes read plus bytes written.

    One rank of a GPU copies while the others of that GPU wait. On a CPU all ranks copy at once. Of all rounds the
    fastest counts; of several devices the slowest.

    Returns:
        The rate of torch's copy, which uses SMs, and that of the copy engines; None for these on a CPU.

    Collective: yes.
    """
    rank = dist.get_rank(session.host_group)
    kind = session.device.type
    ranks_of_device = [
        other for other, name in enumerate(session.device_of_rank) if name == session.device_of_rank[rank]
    ]
    copying = ranks_of_device if kind == "cpu" else ranks_of_device[:1]
    num_bytes = _COPY_BYTES[kind] if rank in copying else 0
    source = torch.ones(num_bytes, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)

    def rate_of(copy: Callable[[], object]) -> float:
        times_ms = []
        for _ in range(_COPY_ROUNDS):
            dist.barrier(session.host_group)
            times_ms.append((_time_on_host if kind == "cpu" else _time_on_cuda)(copy) / STEPS_PER_ROUND)
        # Time per byte, so that the slowest device shows even if devices have different numbers of ranks.
        moved_bytes = 2 * _COPY_BYTES[kind] * len(copying)
        ms_per_byte = _slowest_rank_ms([time_ms / moved_bytes for time_ms in times_ms], session.host_group)
        return _MS_PER_S / min(ms_per_byte) / _BYTES_PER_GB

    copy_gbs = rate_of(lambda: target.copy_(source))
    if kind == "cpu":
        return copy_gbs, None
    # The legacy default stream takes no batches.
    stream = torch.cuda.Stream(session.device)
    stream.wait_stream(torch.cuda.current_stream(session.device))
    with torch.cuda.stream(stream):
        engine_gbs = rate_of(
            lambda: copy_batch(stream.cuda_stream, [Copy(target.data_ptr(), source.data_ptr(), num_bytes)])
        )
    return copy_gbs, engine_gbs


def _slowest_rank_ms(times_ms: Sequence[float], host_group: dist.ProcessGroup) -> list[float]:
    times = torch.tensor(times_ms, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=host_group)
    slowest: list[float] = times.tolist()
    return slowest


def _time_on_host(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(STEPS_PER_ROUND):
        step()
    return (time.perf_counter() - start) * _MS_PER_S


def _time_on_cuda(step: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(STEPS_PER_ROUND):
        step()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
