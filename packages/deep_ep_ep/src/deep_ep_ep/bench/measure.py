"""Owns the taking of time: of calls on all ranks, of a plain copy on the same device, and of a case as a whole.

A round's time is that of its slowest rank, because a step of a model waits for it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from deep_ep_core.align import align_up
from deep_ep_core.env import get_env
from deep_ep_core.errors import ConfigError
from deep_ep_ep.bench.cases import (
    Case,
    Op,
    busiest_device_bytes,
    bytes_moved_by_rank,
    make_topk_idx,
    window_result_bytes,
)
from deep_ep_ep.bench.expected import Rows
from deep_ep_ep.bench.tasks import Task, check_results, make_task
from deep_ep_ep.buffer import ElasticBuffer
from deep_ep_ep.choice import BackendName
from deep_ep_ep.sizing import BUFFER_ALIGNMENT_BYTES

__all__ = [
    "CaseRunner",
    "Measurement",
    "Session",
    "Spread",
    "measure_copy_gbs",
    "slowest_rank_ms",
    "time_host_calls",
    "time_rounds",
]

_MS_PER_S = 1e3
_BYTES_PER_GB = 1e9
# With its target more than a cache holds, so that the copy runs at the rate of the memory.
_COPY_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
_COPIES_PER_ROUND = 4
_COPY_ROUNDS = 10
_COPY_WARMUP = 3
# Enough that the launch of the graph does not count.
_CALLS_PER_GRAPH = 20
# Cheap, and they spread widely.
_HOST_CALLS_PER_ROUND = 10
# Far fewer than a stream's queue takes before it makes the host wait.
_HOST_CALLS_UNDER_WAY = 8
# It is slow, and no one tunes it.
_MAX_BASELINE_ROUNDS = 5


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
        has_baseline: Whether torch's all-to-all is timed too.
    """

    group: dist.ProcessGroup
    host_group: dist.ProcessGroup
    device: torch.device
    device_of_rank: Sequence[str]
    backend: BackendName
    num_rounds: int
    num_warmup: int
    has_baseline: bool = True


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
        baseline: Times of the same with torch's all-to-all; None where they were not taken.
        bytes_moved: The least that the busiest device reads and writes.
        num_bytes: Size of the buffer.
        window_bytes: Memory that the buffer takes on each rank; None where the backend takes none.
    """

    backend: str
    num_sms: int | None
    library: Spread
    baseline: Spread | None
    bytes_moved: int
    num_bytes: int
    window_bytes: int | None


class CaseRunner:
    """Runs cases one after the other.

    Cases that can have the same buffer share it, and the time of a baseline stands for all cases that it is the same
    for, because these cost more than what is measured.

    Args:
        session: The ranks, and how they measure.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._buffer: ElasticBuffer | None = None
        self._buffer_key: object = None
        self._baselines: dict[Case, Spread] = {}

    def run(self, case: Case) -> Measurement:
        """Check what the library and the baseline return in a case, then time both.

        Raises:
            DeepEPError: A result is wrong, or the library refuses the case.

        Collective: yes.
        """
        session = self._session
        if case.mode == "graph" and session.device.type != "cuda":
            raise ConfigError(
                f"a CUDA graph needs a GPU (got {session.device.type}); use --device cuda, or --mode stream"
            )
        topk_idx = make_topk_idx(case)
        buffer = self._buffer_for(case, topk_idx)
        assert buffer.runtime is not None
        task = make_task(case, topk_idx, buffer, device=session.device)
        check_results(case, task.run(), task.expected, rank=buffer.rank_idx, whose="the library")
        measurement = Measurement(
            backend=buffer.runtime.name,
            num_sms=task.num_sms if buffer.runtime.name == "device" else None,
            library=Spread.of(slowest_rank_ms(self._time(case, task, buffer), session.host_group)),
            baseline=self._baseline(case, task, buffer),
            bytes_moved=busiest_device_bytes(bytes_moved_by_rank(case, topk_idx), session.device_of_rank),
            num_bytes=buffer.num_bytes,
            window_bytes=getattr(buffer.runtime, "window_bytes", None),
        )
        if case.mode == "graph":
            # What a graph has used of a window stays taken.
            self.close()
        if session.device.type == "cuda":
            # Ranks may share the GPU's memory.
            torch.cuda.empty_cache()
        return measurement

    def close(self) -> None:
        """Let go of the buffer. Collective: no."""
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = self._buffer_key = None

    def _buffer_for(self, case: Case, topk_idx: torch.Tensor) -> ElasticBuffer:
        """A buffer in whose window the results of one dispatch fit, however they are laid out."""
        hint = ElasticBuffer.get_buffer_size_hint(
            self._session.group, case.num_tokens, case.hidden, num_topk=case.num_topk
        )
        num_bytes = hint
        if case.recv_memory != "torch":
            num_bytes = max(hint, align_up(window_result_bytes(case, topk_idx), BUFFER_ALIGNMENT_BYTES))
        key = (case.num_tokens, case.hidden, case.num_topk, case.recv_memory, num_bytes)
        if self._buffer is None or self._buffer_key != key:
            self.close()
            self._buffer = ElasticBuffer(
                self._session.group,
                num_bytes=num_bytes,
                num_max_tokens_per_rank=case.num_tokens,
                hidden=case.hidden,
                num_topk=case.num_topk,
                backend=self._session.backend,
                recv_memory=case.recv_memory,
            )
            self._buffer_key = key
        return self._buffer

    def _time(self, case: Case, task: Task, buffer: ElasticBuffer) -> list[float]:
        session = self._session
        if case.mode == "host":
            return time_host_calls(
                task.run,
                device=session.device,
                num_calls=_HOST_CALLS_PER_ROUND * session.num_rounds,
                num_warmup=_HOST_CALLS_PER_ROUND * session.num_warmup,
            )
        if case.mode == "stream":
            return self._rounds(task.run, buffer)
        graph, rows = _capture(task.run)
        graph.replay()
        check_results(case, rows, task.expected, rank=buffer.rank_idx, whose="the library in a CUDA graph")
        return [time_ms / _CALLS_PER_GRAPH for time_ms in self._rounds(graph.replay, buffer)]

    def _rounds(self, call: Callable[[], object], buffer: ElasticBuffer, num_rounds: int | None = None) -> list[float]:
        barrier = functools.partial(buffer.barrier, use_comm_stream=False)
        return time_rounds(
            call,
            device=self._session.device,
            barrier=None if get_env().disable_barrier_profiling else barrier,
            num_rounds=num_rounds or self._session.num_rounds,
            num_warmup=min(self._session.num_warmup, num_rounds or self._session.num_warmup),
        )

    def _baseline(self, case: Case, task: Task, buffer: ElasticBuffer) -> Spread | None:
        if not self._session.has_baseline or case.mode == "host":
            return None
        # It knows its counts, and has neither windows nor a choice of SMs.
        op: Op = "combine" if case.op == "combine" else "dispatch"
        key = replace(case, op=op, num_sms=0, recv_memory="auto", mode="stream", name="")
        if key not in self._baselines:
            check_results(case, task.run_baseline(), task.expected, rank=buffer.rank_idx, whose="the baseline")
            times_ms = self._rounds(task.run_baseline, buffer, min(self._session.num_rounds, _MAX_BASELINE_ROUNDS))
            self._baselines[key] = Spread.of(slowest_rank_ms(times_ms, self._session.host_group))
        return self._baselines[key]


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


def time_host_calls(
    call: Callable[[], object], *, device: torch.device, num_calls: int, num_warmup: int
) -> list[float]:
    """Time how long a call keeps this rank's host, call by call; what it returns is dropped outside of the time.

    The host waits for the device every few calls, between them and not in their time.

    Args:
        call: What is timed; it must not wait for the device by itself.
        device: Where it runs.
        num_calls: Calls that count.
        num_warmup: Calls before them that do not.

    Returns:
        Milliseconds, one number a call.

    Collective: as the call is.
    """
    times_ms = []
    for call_idx in range(num_warmup + num_calls):
        if device.type == "cuda" and call_idx % _HOST_CALLS_UNDER_WAY == 0:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        returned = call()
        times_ms.append((time.perf_counter() - start) * _MS_PER_S)
        del returned
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


def _capture(call: Callable[[], Rows]) -> tuple[torch.cuda.CUDAGraph, Rows]:
    """A graph of several calls, each of which drops what it returns before the next; and what the last returns."""
    # A graph takes only memory of a window that nothing under way uses.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events in a thread of its own meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_CALLS_PER_GRAPH - 1):
            call()
        rows = call()
    return graph, rows
