"""Owns the taking of time: of calls on all ranks, of a plain copy on the same device, and of a case as a whole.

A round's time is that of its slowest rank, because a step of a model waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from deep_ep_core.env import get_env
from deep_ep_ep.bench.cases import Case, busiest_device_bytes, bytes_moved_by_rank, make_topk_idx
from deep_ep_ep.bench.tasks import check_results, make_task
from deep_ep_ep.buffer import ElasticBuffer

__all__ = ["Measurement", "Session", "Spread", "measure_case", "measure_copy_gbs", "slowest_rank_ms", "time_rounds"]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
# With its target more than a cache holds, so that the copy runs at the rate of the memory.
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_COPIES_PER_ROUND = 4
_COPY_ROUNDS = 10
_COPY_WARMUP = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Session:
    """The ranks of one run, and how they measure.

    Attributes:
        group: Whose ranks exchange rows.
        host_group: The same ranks over the CPU, for barriers and for gathering times.
        device: Of this rank.
        device_of_rank: A name for the device of each rank, by rank; ranks of one device share its memory.
        backend: As `ElasticBuffer` takes it.
        num_rounds: Timed rounds of each call.
        num_warmup: Rounds before them.
    """

    group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    device: torch.device
    device_of_rank: Sequence[str]
    backend: Literal["auto", "collective", "device"]
    num_rounds: int
    num_warmup: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, least and most over the rounds, of the slowest rank of each, in milliseconds."""

    median_ms: float
    min_ms: float
    max_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Spread:
        """The spread of a list that is not empty."""
        return cls(median_ms=statistics.median(times_ms), min_ms=min(times_ms), max_ms=max(times_ms))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one case came to; alike on all ranks.

    Attributes:
        backend: Name of the backend that ran.
        num_sms: SMs that the operation was given; None where its backend has no kernels to give them to.
        library: Times of the library's operation.
        baseline: Times of the same with torch's all-to-all.
        bytes_moved: The least that the busiest device reads and writes.
    """

    backend: str
    num_sms: int | None
    library: Spread
    baseline: Spread
    bytes_moved: int


def measure_case(case: Case, session: Session) -> Measurement:
    """Check that the library and the baseline agree on a case, then time both.

    Raises:
        DeepEPError: They do not agree, or the library refuses the case.

    Collective: yes.
    """
    topk_idx = make_topk_idx(case)
    with ElasticBuffer(
        session.group,
        num_max_tokens_per_rank=case.num_tokens,
        hidden=case.hidden,
        num_topk=case.num_topk,
        backend=session.backend,
    ) as buffer:
        assert buffer.runtime is not None
        backend = buffer.runtime.name
        task = make_task(case, topk_idx, buffer, device=session.device)
        check_results(task, rank=buffer.rank_idx)

        def spread_of(call: Callable[[], object]) -> Spread:
            times_ms = time_rounds(
                call,
                device=session.device,
                barrier=None if get_env().disable_barrier_profiling else buffer.barrier,
                num_rounds=session.num_rounds,
                num_warmup=session.num_warmup,
            )
            return Spread.of(slowest_rank_ms(times_ms, session.host_group))

        return Measurement(
            backend=backend,
            num_sms=task.num_sms if backend == "device" else None,
            library=spread_of(task.run),
            baseline=spread_of(task.run_baseline),
            bytes_moved=busiest_device_bytes(bytes_moved_by_rank(case, topk_idx), session.device_of_rank),
        )


def time_rounds(
    call: Callable[[], object],
    *,
    device: torch.device,
    barrier: Callable[[], None] | None,
    num_rounds: int,
    num_warmup: int,
) -> list[float]:
    """Time a call on this rank, round by round.

    On CUDA the time runs between two events on the current stream, so it holds what the call makes the stream wait for,
    host work included; on the CPU it is the call's own duration. What the call returns is dropped before the next
    round.

    Args:
        call: What is timed.
        device: Where it runs.
        barrier: Called before each round, so that the ranks start together; None for none.
        num_rounds: Rounds that count.
        num_warmup: Rounds before them that do not.

    Returns:
        Milliseconds, one number a round.

    Collective: as the call and the barrier are.
    """
    time_call = _time_on_cuda if device.type == "cuda" else _time_on_host
    times_ms = []
    for _ in range(num_warmup + num_rounds):
        if barrier is not None:
            barrier()
        times_ms.append(time_call(call))
    return times_ms[num_warmup:]


def slowest_rank_ms(times_ms: Sequence[float], host_group: dist.ProcessGroup) -> list[float]:
    """The greatest time of each round over the ranks. Collective: yes, over the CPU."""
    times = torch.tensor(times_ms, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=host_group)
    slowest: list[float] = times.tolist()
    return slowest


def measure_copy_gbs(session: Session) -> float:
    """The rate at which a device copies its own memory, in GB/s (1e9 bytes), bytes read plus bytes written.

    One rank of a GPU copies while the others of that GPU wait: it fills the GPU by itself, and without MPS they would
    only take turns. On a CPU all ranks of the machine copy at once, since one thread does not fill its memory. Of all
    rounds the fastest counts, since the figure stands for what the device can do; of several devices the slowest.

    Collective: yes.
    """
    my_device = session.device_of_rank[dist.get_rank(session.host_group)]
    ranks_of_device = [rank for rank, name in enumerate(session.device_of_rank) if name == my_device]
    copying = ranks_of_device if session.device.type == "cpu" else ranks_of_device[:1]
    num_bytes = _COPY_BYTES[session.device.type] if dist.get_rank(session.host_group) in copying else 0
    source = torch.ones(num_bytes, dtype=torch.uint8, device=session.device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_COPIES_PER_ROUND):
            target.copy_(source)

    times_ms = time_rounds(
        copy,
        device=session.device,
        barrier=lambda: dist.barrier(session.host_group),
        num_rounds=_COPY_ROUNDS,
        num_warmup=_COPY_WARMUP,
    )
    moved_bytes = 2 * _COPY_BYTES[session.device.type] * _COPIES_PER_ROUND * len(copying)
    # Time per byte, so that the slowest device shows even if devices have different numbers of ranks.
    ms_per_byte = slowest_rank_ms([time_ms / moved_bytes for time_ms in times_ms], session.host_group)
    return _MS_PER_S / min(ms_per_byte) / _BYTES_PER_GB


def _time_on_host(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * _MS_PER_S


def _time_on_cuda(call: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))
