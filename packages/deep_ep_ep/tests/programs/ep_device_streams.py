"""The device backend between streams: what is behind a call, what is in front of it, and barriers of streams."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ep_device_setting import on_device
from ep_device_shapes import make_large_buffer
from ep_rows import Problem, check_arrival, check_combined, make_problem

from deep_ep_ep import ElasticBuffer

_SHORT_SLEEP_CYCLES = 20_000_000
_LONG_SLEEP_CYCLES = 400_000_000


def _problem(seed: int, hidden: int = 256) -> Problem:
    num_ranks = dist.get_world_size()
    return make_problem(seed, [33] * num_ranks, num_experts=2 * num_ranks, num_topk=2, hidden=hidden)


def _late_inputs(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs that the current stream fills in behind a slow kernel; until then they are wrong."""
    x, topk_idx, weights = problem.inputs(dist.get_rank())
    assert isinstance(x, torch.Tensor)
    late = torch.zeros_like(x), torch.full_like(topk_idx, -1), torch.zeros_like(weights)
    torch.cuda.current_stream().synchronize()
    torch.cuda._sleep(_SHORT_SLEEP_CYCLES)
    for place, value in zip(late, (x, topk_idx, weights), strict=True):
        place.copy_(value)
    return late


def check_streams(recv_memory: str) -> None:
    """Work in front of a call and behind its event is ordered with it, without a wait of the host."""
    with on_device(recv_memory, num_bytes=64 << 20):
        rank, buffer = dist.get_rank(), make_large_buffer(33, 256)
        own_stream = torch.cuda.Stream()
        for seed in range(6):
            problem, is_async, do_cpu_sync = _problem(seed), seed % 2 == 0, seed % 3 == 0
            with torch.cuda.stream(own_stream):
                x, topk_idx, weights = _late_inputs(problem)
                *sent, event = buffer.dispatch(
                    x,
                    topk_idx=topk_idx,
                    topk_weights=weights,
                    num_experts=problem.num_experts,
                    do_cpu_sync=do_cpu_sync,
                    async_with_compute_stream=is_async,
                )
                assert torch.cuda.current_stream() == own_stream
                if is_async:
                    event.current_stream_wait()
                outputs = buffer.empty_like_recv(sent[3], 256)
                torch.cuda._sleep(_SHORT_SLEEP_CYCLES)
                outputs.copy_(sent[0])
                combined, combined_weights, event = buffer.combine(
                    outputs, sent[3], topk_weights=sent[2], async_with_compute_stream=is_async
                )
                # The call reads them behind this point of the host; the heap must not hand them out again before.
                del outputs
                if is_async:
                    event.current_stream_wait()
                copies = combined.clone(), combined_weights.clone()
                check_arrival(problem, rank, sent, do_cpu_sync=do_cpu_sync)
            own_stream.synchronize()
            check_combined(problem, rank, *copies, do_expand=False)
        buffer.close()


def check_previous_event(recv_memory: str) -> None:
    """A call waits for its previous event, though its own stream knows nothing of the work in front of it."""
    with on_device(recv_memory, num_bytes=64 << 20):
        rank, buffer = dist.get_rank(), make_large_buffer(33, 256)
        for seed in range(4):
            problem = _problem(seed)
            producer, epilogue = torch.cuda.Stream(), torch.cuda.Stream()
            with torch.cuda.stream(producer):
                x, topk_idx, weights = _late_inputs(problem)
                ready = buffer.capture()
            *sent, event = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=weights,
                num_experts=problem.num_experts,
                do_cpu_sync=seed % 2 == 0,
                previous_event=ready,
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
            )
            with torch.cuda.stream(epilogue):
                torch.cuda._sleep(_SHORT_SLEEP_CYCLES)
                before_epilogue = buffer.capture()
            # The event of one call may be the previous event of the next.
            combined, combined_weights, event = buffer.combine(
                sent[0],
                sent[3],
                topk_weights=sent[2],
                previous_event=event,
                previous_event_before_epilogue=before_epilogue,
                async_with_compute_stream=True,
                allocate_on_comm_stream=True,
            )
            event.current_stream_wait()
            check_arrival(problem, rank, sent, do_cpu_sync=seed % 2 == 0)
            check_combined(problem, rank, combined, combined_weights, do_expand=False)
            producer.synchronize()
        buffer.close()


def check_third_stream(recv_memory: str) -> None:
    """Outputs that a third stream uses last are not handed out again before it is done with them."""
    with on_device(recv_memory, num_bytes=4 << 20):
        rank, buffer = dist.get_rank(), make_large_buffer(33, 4096)
        third, copies = torch.cuda.Stream(), []
        # More rows in all than the window has room for, so that they follow each other in the same places.
        for seed in range(24):
            problem = _problem(seed, hidden=4096)
            x, topk_idx, weights = problem.inputs(rank)
            *sent, event = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=weights,
                num_experts=problem.num_experts,
                async_with_compute_stream=True,
            )
            with torch.cuda.stream(third):
                event.current_stream_wait()
                torch.cuda._sleep(_SHORT_SLEEP_CYCLES // 4)
                copies.append((problem, [sent[0].clone(), sent[1].clone(), sent[2].clone(), sent[3]]))
                # Torch's own memory needs to be told; the heap notices where the last view dies.
                for tensor in sent[0 if recv_memory == "torch" else 1 : 3]:
                    tensor.record_stream(third)
                del sent, tensor
        third.synchronize()
        for problem, sent in copies:
            check_arrival(problem, rank, sent)
        buffer.close()


def _assert_all_come_after_the_slow_rank(
    buffer: ElasticBuffer, slow_rank: int, barrier: Callable[[], None], *, waits_on_host: bool
) -> None:
    """Nobody passes a barrier before a slow kernel that stands in front of one rank's barrier has ended.

    Bounds that hold however late a process is: the kernel ends at the earliest its own length after its launch.
    """
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    dist.barrier()
    launched_s = time.monotonic()
    begin.record()
    if dist.get_rank() == slow_rank:
        torch.cuda._sleep(_LONG_SLEEP_CYCLES)
    end.record()
    # Otherwise fast ranks might be slower by themselves.
    dist.barrier()
    barrier()
    if not waits_on_host:
        torch.cuda.current_stream().synchronize()
    passed_s = time.monotonic()
    torch.cuda.synchronize()
    ends_s: list[float] = [0.0] * dist.get_world_size()
    dist.all_gather_object(ends_s, launched_s + begin.elapsed_time(end) / 1000)
    # One machine has one monotonic clock. The resolution of CUDA's events is 0.5 us.
    assert passed_s >= ends_s[slow_rank] - 1e-3, (passed_s, ends_s, slow_rank)


def check_barrier(recv_memory: str) -> None:
    """Streams pass together, on the communication stream or the current one; the host waits where it is asked to."""
    with on_device(recv_memory, num_bytes=2 << 20):
        buffer, num_ranks = make_large_buffer(8, 64), dist.get_world_size()
        ways: list[tuple[Callable[[], None], bool]] = [
            (buffer.barrier, False),
            (lambda: buffer.barrier(use_comm_stream=False), False),
            (lambda: buffer.barrier(with_cpu_sync=True), True),
        ]
        for way_idx, (barrier, waits_on_host) in enumerate(ways):
            slow_rank = (num_ranks - 1 + way_idx) % num_ranks
            _assert_all_come_after_the_slow_rank(buffer, slow_rank, barrier, waits_on_host=waits_on_host)
        # Barriers of both kinds and operations follow each other.
        problem = _problem(1)
        other = make_large_buffer(33, 256)
        for use_comm_stream in (True, False, True):
            buffer.barrier(use_comm_stream=use_comm_stream)
            x, topk_idx, _ = problem.inputs(dist.get_rank())
            sent = other.dispatch(x, topk_idx=topk_idx, num_experts=problem.num_experts)
            other.barrier(use_comm_stream=use_comm_stream)
            check_arrival(problem, dist.get_rank(), sent)
        buffer.close()
        other.close()


def check_barriers_beside_operations(recv_memory: str) -> None:
    """A barrier on one stream while a dispatch is under way on another, and the other way round."""
    with on_device(recv_memory, num_bytes=4 << 20):
        rank, buffer, other = dist.get_rank(), make_large_buffer(33, 256), torch.cuda.Stream()
        for seed in range(8):
            problem = _problem(seed)
            x, topk_idx, topk_weights = problem.inputs(rank)
            *sent, event = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=topk_weights,
                num_experts=problem.num_experts,
                do_cpu_sync=seed % 2 == 0,
                async_with_compute_stream=True,
            )
            buffer.barrier(use_comm_stream=False)
            with torch.cuda.stream(other):
                buffer.barrier(use_comm_stream=False)
            event.current_stream_wait()
            check_arrival(problem, rank, sent, do_cpu_sync=seed % 2 == 0)
        buffer.close()
