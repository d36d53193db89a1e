"""Many random calls on buffers of the device backend: whatever came before, each gives what it must."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from ep_device_setting import on_device
from ep_device_shapes import make_large_buffer
from ep_rows import Problem, arrival_of, check_arrival, check_combined, check_rows, make_problem

from deep_ep_ep import ElasticBuffer, EPHandle

_MAX_LIVE = 6
_ROUNDS_BETWEEN_CLOCKS = 20


@dataclass
class Live:
    """A dispatch whose handle is alive, and all that was made with it."""

    buffer: ElasticBuffer
    problem: Problem
    handle: EPHandle
    recv_x: torch.Tensor
    results: tuple  # type: ignore[type-arg]
    again: list[tuple] = field(default_factory=list)  # type: ignore[type-arg]
    back: list[tuple] = field(default_factory=list)  # type: ignore[type-arg]

    def compare(self) -> None:
        rank, exact = dist.get_rank(), self.handle.was_cpu_synced
        check_arrival(self.problem, rank, self.results, do_cpu_sync=exact)
        wanted = arrival_of(self.problem, rank)
        for recv_x, weights, do_expand in self.again:
            check_rows(self.problem, wanted, recv_x, weights, do_expand=do_expand, do_cpu_sync=exact)
        for combined, weights in self.back:
            check_combined(
                self.problem,
                rank,
                combined,
                weights,
                do_expand=self.handle.do_expand,
                allow_multiple_reduction=self.buffer.allow_multiple_reduction,
            )


def random_problem(shared: random.Random, num_ranks: int) -> Problem:
    """Sizes of all kinds; what is large in one respect is small in another, so that the worst case fits."""
    kind = shared.choice(("usual", "usual", "usual", "tiles", "pieces", "experts"))
    num_max_tokens = {"tiles": 1100, "pieces": 12}.get(kind, shared.choice((1, 8, 33, 130)))
    hidden = {"tiles": 16, "pieces": shared.choice((8200, 16392))}.get(kind, shared.choice((8, 16, 64, 256)))
    num_local = {"tiles": 2, "pieces": 2, "experts": shared.choice((32, 40))}.get(kind, shared.choice((1, 2, 3, 8)))
    num_experts = num_local * num_ranks
    num_topk = shared.choice((1, 2, 4, 8, 32) if kind == "usual" else (1, 2, 4))
    counts = [shared.choice((0, 1, num_max_tokens, shared.randint(0, num_max_tokens))) for _ in range(num_ranks)]
    return make_problem(
        shared.getrandbits(31),
        counts,
        num_experts=num_experts,
        num_topk=num_topk,
        num_max_tokens=num_max_tokens,
        idx_dtype=shared.choice((torch.int64, torch.int64, torch.int32)),
        masked_share=shared.choice((0.0, 0.2, 0.9, 1.0)),
        hidden=hidden,
        expert_alignment=shared.choice((1, 1, 4, 32)),
        num_sf_packs=shared.choice((0, 1, 2)) if hidden >= 64 else 0,
    )


def dispatch(buffer: ElasticBuffer, problem: Problem, shared: random.Random, own: random.Random) -> Live:
    x, topk_idx, weights = problem.inputs(dist.get_rank())
    has_weights, do_expand, do_cpu_sync = shared.random() < 0.7, shared.random() < 0.5, shared.random() < 0.6
    is_async = own.random() < 0.3
    *results, event = buffer.dispatch(
        x,  # type: ignore[arg-type]
        topk_idx=topk_idx,
        topk_weights=weights if has_weights else None,
        num_experts=problem.num_experts,
        num_max_tokens_per_rank=problem.num_max_tokens,
        expert_alignment=problem.expert_alignment,
        do_expand=do_expand,
        do_cpu_sync=do_cpu_sync,
        # Each rank may have its own.
        num_sms=own.randint(1, 16),
        do_handle_copy=own.random() < 0.5,
        async_with_compute_stream=is_async,
    )
    if is_async:
        event.current_stream_wait()
    recv_x = results[0][0] if isinstance(results[0], tuple) else results[0]
    return Live(buffer, problem, results[3], recv_x, tuple(results))


def dispatch_again(live: Live, shared: random.Random, own: random.Random) -> None:
    """The same routing once more; an expert-major handle can lay rows out by token too."""
    x, _, weights = live.problem.inputs(dist.get_rank())
    do_expand = live.handle.do_expand and shared.random() < 0.6
    has_weights = shared.random() < 0.5
    recv_x, _, recv_weights, _, _ = live.buffer.dispatch(
        x,  # type: ignore[arg-type]
        handle=live.handle,
        topk_weights=weights if has_weights else None,
        do_expand=do_expand,
        do_zero_padding=do_expand and own.random() < 0.5,
        num_sms=own.randint(0, 16),
    )
    live.again.append((recv_x, recv_weights, do_expand))


def combine(live: Live, own: random.Random) -> None:
    """Back from the received tensor itself, from a copy in the window if there is room, or from one elsewhere."""
    rows, place = live.recv_x, own.choice(("in place", "in the window", "elsewhere"))
    if place == "in the window":
        rows = live.buffer.empty_like_recv(live.handle, rows.size(1)).copy_(rows)
    elif place == "elsewhere":
        rows = rows.clone()
    weights = live.results[2]
    if live.handle.do_expand and not live.buffer.allow_multiple_reduction:
        weights = None
    combined, combined_weights, _ = live.buffer.combine(
        rows, live.handle, topk_weights=weights, num_sms=own.randint(0, 16)
    )
    live.back.append((combined, combined_weights))


def check_random_calls(recv_memory: str, num_rounds: int = 1000, time_limit_s: float = 300.0, seed: int = 0) -> int:
    """Random calls on two buffers, several handles alive; compared when a handle is dropped.

    Ends early, on all ranks alike, when one of them has run for `time_limit_s`. Returns how many calls were made.
    """
    begin, num_ranks, rank = time.monotonic(), dist.get_world_size(), dist.get_rank()
    # What all ranks must do alike, and what each may do in its own way.
    shared, own = random.Random(seed), random.Random(seed * 1000 + rank + 1)
    live: list[Live] = []
    num_done = 0
    # "window" must hold all that lives; in "auto" the heap shall be too small at times.
    with on_device(recv_memory, num_bytes=(192 << 20) if recv_memory == "window" else (24 << 20)):
        buffers = [
            make_large_buffer(130, 256, largest=(12, 16392, 4), allow_multiple_reduction=flag) for flag in (True, False)
        ]
        for round_idx in range(num_rounds):
            if round_idx % _ROUNDS_BETWEEN_CLOCKS == 0:
                is_over = torch.tensor([int(time.monotonic() - begin > time_limit_s)])
                dist.all_reduce(is_over)
                if is_over.item():
                    break
            if len(live) == _MAX_LIVE or (live and shared.random() < 0.1):
                live.pop(shared.randrange(len(live))).compare()
            kind = shared.choice(("dispatch", "again", "combine", "combine")) if live else "dispatch"
            if kind == "dispatch":
                live.append(dispatch(shared.choice(buffers), random_problem(shared, num_ranks), shared, own))
            elif kind == "again":
                dispatch_again(shared.choice(live), shared, own)
            else:
                combine(shared.choice(live), own)
            num_done += 1
        while live:
            live.pop().compare()
        for buffer in buffers:
            buffer.close()
    return num_done
