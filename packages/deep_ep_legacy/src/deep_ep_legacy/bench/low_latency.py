"""Owns the timing of low-latency calls: whole ones and halves, inside CUDA graphs and one by one.

A round's time is that of its slowest rank, because a step of a model waits for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from deep_ep_legacy.buffer import Buffer

__all__ = ["Sizes", "Timing", "measure_copy_gbs", "measure_low_latency"]

# Enough that the launch of a graph does not count.
_CALLS_PER_GRAPH = 20
# Cycles of the SM's clock: longer than the host takes to launch what is timed, so that it waits in the queue.
_HEAD_START_CYCLES = 1_000_000
_NUM_WARMUP = 5
_COPY_BYTES = 256 << 20
# Enough that ranks of one GPU copy at the same time, though they do not begin at the same time.
_COPIES_PER_ROUND = 20
_FP8_TOKEN_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is sent: of each rank `num_tokens` rows of `hidden` channels, each to `num_topk` of `num_experts`."""

    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int

    @property
    def num_selections(self) -> int:
        """Rows that a rank sends, and gets back."""
        return self.num_tokens * self.num_topk

    def row_bytes(self, dtype: str) -> int:
        """Bytes of a row on its way, as DeepEP counts them for its published rates."""
        scales = self.hidden // 128 * 4
        return {"fp8": self.hidden + scales + _FP8_TOKEN_BYTES, "bf16": 2 * self.hidden}.get(
            dtype, self.hidden * 10 // 8 + scales
        )

    def least_bytes(self, op: str, dtype: str) -> int:
        """The least that a rank's memory must read and write: rows once in, and once out or summed."""
        own = self.num_tokens * self.hidden * 2
        moved = self.num_selections * (self.hidden + self.hidden // 32 if dtype == "fp8" else 2 * self.hidden)
        return own + moved if op == "dispatch" else moved + own


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times of one case, in milliseconds, of the slowest rank of each round.

    Attributes:
        op: See `report.Record`, as for the others.
        dtype, mode, has_hook: What was timed.
        times_ms: By round.
    """

    op: str
    dtype: str
    mode: str
    has_hook: bool
    times_ms: list[float]

    @property
    def median_ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.times_ms)


def measure_copy_gbs() -> float:
    """GB/s of a copy, read plus write, while all ranks of the device copy. Collective: yes."""
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(_COPIES_PER_ROUND):
            target.copy_(source)

    times = _time_rounds(copy, 5)
    gpus: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(gpus, str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    num_sharing = max(gpus.count(gpu) for gpu in gpus)
    return 2 * _COPY_BYTES * _COPIES_PER_ROUND * num_sharing / statistics.median(times) / 1e6


def measure_low_latency(buffer: Buffer, sizes: Sizes, *, seed: int, num_rounds: int) -> Iterator[Timing]:
    """Time FP8 and bfloat16 dispatch, and bfloat16 combine with and without LogFMT. Collective: yes."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    x = torch.randn(sizes.num_tokens, sizes.hidden, generator=generator).to(torch.bfloat16).cuda()
    topk_idx = torch.rand(sizes.num_tokens, sizes.num_experts, generator=generator).topk(sizes.num_topk).indices.cuda()
    weights = torch.rand(sizes.num_tokens, sizes.num_topk, generator=generator).cuda()
    dispatched = (x, topk_idx, sizes.num_tokens, sizes.num_experts)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(*dispatched, use_fp8=False)
    assert isinstance(recv_x, torch.Tensor), "bfloat16 has no scales"
    rows = torch.nan_to_num(recv_x * 0.01)

    def dispatch(dtype: str, has_hook: bool) -> Callable[[], None] | None:
        return buffer.low_latency_dispatch(*dispatched, use_fp8=dtype == "fp8", return_recv_hook=has_hook)[4]

    def combine(dtype: str, has_hook: bool) -> Callable[[], None] | None:
        return buffer.low_latency_combine(
            rows, topk_idx, weights, handle, use_logfmt=dtype == "logfmt", return_recv_hook=has_hook
        )[2]

    for op, call, dtypes in (("dispatch", dispatch, ("fp8", "bf16")), ("combine", combine, ("bf16", "logfmt"))):
        for dtype in dtypes:
            for has_hook in (False, True):

                def whole(call=call, dtype=dtype, has_hook=has_hook) -> None:  # type: ignore[no-untyped-def]
                    hook = call(dtype, has_hook)
                    if hook is not None:
                        hook()

                times = [time_ms / _CALLS_PER_GRAPH for time_ms in _time_rounds(_graph_of(whole), num_rounds)]
                yield Timing(op=op, dtype=dtype, mode="graph", has_hook=has_hook, times_ms=times)
                yield Timing(
                    op=op, dtype=dtype, mode="stream", has_hook=has_hook, times_ms=_time_rounds(whole, num_rounds)
                )
                yield Timing(op=op, dtype=dtype, mode="host", has_hook=has_hook, times_ms=_time_host(whole, num_rounds))
            sent, received = _time_halves(lambda call=call, dtype=dtype: call(dtype, True), num_rounds)  # type: ignore[misc]
            for half, times in (("send", sent), ("receive", received)):
                yield Timing(op=f"{op}-{half}", dtype=dtype, mode="stream", has_hook=True, times_ms=times)


def _graph_of(call: Callable[[], None]) -> Callable[[], None]:
    """The replay of a graph of some calls."""
    # Loads the kernels, which a capture must not.
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_PER_GRAPH):
            call()
    return graph.replay


def _time_rounds(call: Callable[[], object], num_rounds: int) -> list[float]:
    """Time calls on the device, in milliseconds; the ranks begin each round together."""
    own = []
    for _ in range(_NUM_WARMUP + num_rounds):
        begin, end = _meet()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        own.append(begin.elapsed_time(end))
    return _slowest(own[_NUM_WARMUP:])


def _time_host(call: Callable[[], object], num_rounds: int) -> list[float]:
    """Time what the host takes for a call, in milliseconds, while the device is behind."""
    own = []
    for _ in range(_NUM_WARMUP + num_rounds):
        _meet()
        begin_ns = time.perf_counter_ns()
        call()
        own.append((time.perf_counter_ns() - begin_ns) / 1e6)
        torch.cuda.synchronize()
    return _slowest(own[_NUM_WARMUP:])


def _time_halves(send: Callable[[], Callable[[], None] | None], num_rounds: int) -> tuple[list[float], list[float]]:
    """Time the half that sends, and that which receives once all ranks have sent."""
    sent, received = [], []
    for _ in range(_NUM_WARMUP + num_rounds):
        begin, end = _meet()
        begin.record()
        hook = send()
        end.record()
        torch.cuda.synchronize()
        sent.append(begin.elapsed_time(end))
        begin, end = _meet()
        begin.record()
        assert hook is not None, "it was asked for"
        hook()
        end.record()
        torch.cuda.synchronize()
        received.append(begin.elapsed_time(end))
    return _slowest(sent[_NUM_WARMUP:]), _slowest(received[_NUM_WARMUP:])


def _meet() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    """Let the ranks begin a round together, with a pause in the queue in front of it; two events to time it."""
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda._sleep(_HEAD_START_CYCLES)
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _slowest(own_ms: list[float]) -> list[float]:
    """By round, the time of the slowest rank."""
    times = torch.tensor(own_ms, dtype=torch.float64)
    dist.all_reduce(times, op=dist.ReduceOp.MAX)
    return [float(time_ms) for time_ms in times]
