"""Ranks that disagree, die, come late, or refuse; what the others are told."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from ep_cases import Case, make_buffer, make_sent

from deep_ep_core.transport import Operation

CASE = Case(num_tokens=(8, 8, 8, 8))


def disagree(odd_rank: int, changes: dict[str, object]) -> None:
    """One dispatch in which `odd_rank` passes something else."""
    rank = dist.get_rank()
    sent = make_sent(CASE)[rank]
    mine = changes if rank == odd_rank else {}
    buffer = make_buffer(CASE, num_cpu_timeout_secs=20, num_bytes=64 << 20)
    x = sent.x
    if "hidden" in mine:
        x = x.repeat(1, 2)
    if "dtype" in mine:
        x = x.float()
    arguments: dict[str, object] = {"topk_idx": sent.topk_idx, "num_experts": CASE.num_experts}
    if "sf" in mine:
        x = (x, torch.ones(len(x), 2))
    if "num_topk" in mine:
        arguments["topk_idx"] = sent.topk_idx[:, :2].contiguous()
    if "topk_weights" in mine:
        arguments["topk_weights"] = sent.topk_weights
    if "combine" in mine:
        buffer.barrier()
    arguments.update(
        {k: v for k, v in mine.items() if k not in ("hidden", "dtype", "sf", "num_topk", "topk_weights", "combine")}
    )
    buffer.dispatch(x, **arguments)


def agree_after_disagreement() -> float:
    """A disagreement moves nothing, so the same buffer goes on working once the ranks agree."""
    rank = dist.get_rank()
    sent = make_sent(CASE)[rank]
    buffer = make_buffer(CASE, num_cpu_timeout_secs=20)
    with pytest.raises(ValueError, match="num_experts"):
        buffer.dispatch(sent.x, topk_idx=sent.topk_idx, num_experts=16 if rank else 32)
    recv_x, *_ = buffer.dispatch(sent.x, topk_idx=sent.topk_idx, num_experts=16)
    return float(len(recv_x))


def disagree_in_constructor(odd_rank: int, changes: dict[str, object]) -> None:
    make_buffer(CASE, num_cpu_timeout_secs=20, **(changes if dist.get_rank() == odd_rank else {}))


def disagree_in_combine() -> None:
    """Rank 2 passes the handle of an earlier dispatch."""
    rank = dist.get_rank()
    sent = make_sent(CASE)[rank]
    buffer = make_buffer(CASE, num_cpu_timeout_secs=20)
    results = [buffer.dispatch(sent.x, topk_idx=sent.topk_idx, num_experts=CASE.num_experts) for _ in range(2)]
    recv_x, _, _, handle, _ = results[0 if rank == 2 else 1]
    buffer.combine(recv_x, handle)


def die_in_the_middle(victim: int, timeout_s: float) -> None:
    """`victim` is killed after the ranks agreed and before its payload is sent."""
    rank = dist.get_rank()
    sent = make_sent(CASE)[rank]
    buffer = make_buffer(CASE, num_cpu_timeout_secs=timeout_s)
    buffer.barrier()
    if rank == victim:
        original = Operation.exchange

        def exchange_or_die(self, parts, num_send_rows, num_recv_rows, phase):
            if phase == "payload":
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, parts, num_send_rows, num_recv_rows, phase)

        Operation.exchange = exchange_or_die
    buffer.dispatch(sent.x, topk_idx=sent.topk_idx, num_experts=CASE.num_experts)


def come_late(late_rank: int, timeout_s: float, delay_s: float) -> None:
    rank = dist.get_rank()
    sent = make_sent(CASE)[rank]
    buffer = make_buffer(CASE, num_cpu_timeout_secs=timeout_s)
    buffer.barrier()
    if rank == late_rank:
        time.sleep(delay_s)
    buffer.dispatch(sent.x, topk_idx=sent.topk_idx, num_experts=CASE.num_experts)


def refuse(odd_rank: int, timeout_s: float) -> None:
    """`odd_rank` passes what cannot be taken; the others are told why it does not come."""
    rank = dist.get_rank()
    sent = make_sent(CASE)[rank]
    buffer = make_buffer(CASE, num_cpu_timeout_secs=timeout_s)
    topk_idx = sent.topk_idx.clone()
    if rank == odd_rank:
        topk_idx[3, 0] = 99
    buffer.dispatch(sent.x, topk_idx=topk_idx, num_experts=CASE.num_experts)


def use_after_failure(timeout_s: float) -> str:
    rank = dist.get_rank()
    buffer = make_buffer(CASE, num_cpu_timeout_secs=timeout_s)
    sent = make_sent(CASE)[rank]
    if rank == 1:
        time.sleep(timeout_s * 2)
    try:
        buffer.barrier()
    except TimeoutError:
        start = time.monotonic()
        try:
            buffer.dispatch(sent.x, topk_idx=sent.topk_idx, num_experts=CASE.num_experts)
        except Exception as error:
            assert time.monotonic() - start < timeout_s
            return f"{type(error).__name__}: {error}"
    return "no failure"


def drop_without_destroy() -> None:
    """Buffers may be dropped, closed or kept in any order on any rank."""
    rank = dist.get_rank()
    buffers = [make_buffer(CASE, explicitly_destroy=False) for _ in range(3)]
    if rank % 2:
        buffers.reverse()
        buffers.pop().close()
    buffers.clear()
    dist.barrier()
