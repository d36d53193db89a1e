"""The calls that TensorRT-LLM makes, with its arguments: communicators of MPI in place of groups."""

from __future__ import annotations

import torch
import torch.distributed as dist
from legacy_frameworks_problem import HIDDEN, MAX_TOKENS, NUM_EXPERTS, Problem, num_rows_of_local_experts

from deep_ep import Buffer


class Communicator:
    """What an mpi4py communicator of these ranks offers."""

    def Get_rank(self) -> int:  # noqa: N802
        return dist.get_rank()

    def Get_size(self) -> int:  # noqa: N802
        return dist.get_world_size()

    def allgather(self, sendobj: object) -> list[object]:
        gathered: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, sendobj)
        return gathered


class VariableLengthBuffer:
    """Grows only, and drops the old buffer before it makes the next: there is at most one."""

    def __init__(self) -> None:
        self.comm = Communicator()
        self.buffer: Buffer | None = None

    def reserve(self, hidden_size: int) -> None:
        num_ranks = self.comm.Get_size()
        num_nvl_bytes = num_rdma_bytes = 0
        for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
            num_nvl_bytes = max(config.get_nvl_buffer_size_hint(2 * hidden_size, num_ranks), num_nvl_bytes)
            num_rdma_bytes = max(config.get_rdma_buffer_size_hint(2 * hidden_size, num_ranks), num_rdma_bytes)
        if self.buffer is not None:
            num_nvl_bytes = max(num_nvl_bytes, self.buffer.num_nvl_bytes)
            num_rdma_bytes = max(num_rdma_bytes, self.buffer.num_rdma_bytes)
            if (num_nvl_bytes, num_rdma_bytes) == (self.buffer.num_nvl_bytes, self.buffer.num_rdma_bytes):
                return
        self.buffer = None
        self.buffer = Buffer(None, num_nvl_bytes, num_rdma_bytes, num_nvl_peers=num_ranks, comm=self.comm)

    def round_trip(self, p: Problem) -> torch.Tensor:
        assert self.buffer is not None
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, _ = self.buffer.get_dispatch_layout(
            p.topk_idx, NUM_EXPERTS
        )
        recv_x, recv_idx, recv_weights, per_local_expert, handle, event = self.buffer.dispatch(
            p.x,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
        )
        assert event.event is None
        assert per_local_expert == num_rows_of_local_experts(p)
        combined, _, event = self.buffer.combine(p.run_by_token(recv_x, recv_idx, recv_weights), handle)
        assert event.event is None
        return combined


def call_normal() -> None:
    p, holder = Problem(), VariableLengthBuffer()
    made = []
    for hidden_size in (HIDDEN, HIDDEN, 4 * HIDDEN, HIDDEN):
        holder.reserve(hidden_size)
        p.check(holder.round_trip(p))
        assert holder.buffer is not None
        made.append(holder.buffer.num_nvl_bytes)
    assert made[0] == made[1] < made[2] == made[3]


def call_low_latency() -> None:
    p, comm = Problem(), Communicator()
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(MAX_TOKENS, HIDDEN, comm.Get_size(), NUM_EXPERTS)
    buffer = Buffer(
        None,
        0,
        num_rdma_bytes,
        low_latency_mode=True,
        num_qps_per_rank=NUM_EXPERTS // comm.Get_size(),
        comm=comm,
    )
    buffer.clean_low_latency_buffer(MAX_TOKENS, HIDDEN, NUM_EXPERTS)
    recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(
        p.x, p.topk_idx, MAX_TOKENS, NUM_EXPERTS, use_fp8=False
    )
    assert event.event is None
    assert hook is None
    counts = recv_count.tolist()
    assert counts == num_rows_of_local_experts(p)
    combined, event, hook = buffer.low_latency_combine(
        p.run_by_expert(recv_x, counts), p.topk_idx, p.topk_weights, handle
    )
    assert event.event is None
    assert hook is None
    p.check(combined)
