"""Owns the yardstick of the benchmark: dispatch and combine as one would write them with torch's all-to-all.

All counts and positions are known beforehand, so only the moving of rows is timed. It is not part of the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from deep_ep_ep.bench.cases import Case
from deep_ep_ep.routing import layout_experts, local_expert_idx

__all__ = ["BaselinePlan", "combine", "dispatch", "make_plan"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertRows:
    """Where rows lie by expert, for each (received row, local expert) pair.

    Attributes:
        num_rows: Rows of the expert-major tensor, padding included.
        expert_row: `[num_pairs]` int64: row in the expert-major tensor.
        recv_row: `[num_pairs]` int64: row among the received ones.
    """

    num_rows: int
    expert_row: torch.Tensor
    recv_row: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BaselinePlan:
    """One rank's routing, worked out before the time is taken; also what results are checked against.

    Attributes:
        num_tokens: Tokens of this rank.
        send_token_idx: `[num_sent]` int64: the token of each sent row, ordered by (destination rank, token).
        num_send_rows: Rows for each rank.
        num_recv_rows: Rows from each rank.
        recv_source: `[num_recv]` int64: source rank * num_tokens + token of each received row.
        num_summands: `[num_tokens]` int64: rows that a combine adds up for each token.
        expert_rows: The expert-major layout; None where rows are laid out by token.
    """

    num_tokens: int
    send_token_idx: torch.Tensor
    num_send_rows: list[int]
    num_recv_rows: list[int]
    recv_source: torch.Tensor
    num_summands: torch.Tensor
    expert_rows: ExpertRows | None

    @property
    def num_rows(self) -> int:
        """Rows that a dispatch returns, padding included."""
        return sum(self.num_recv_rows) if self.expert_rows is None else self.expert_rows.num_rows


def make_plan(case: Case, topk_idx: torch.Tensor, *, rank: int, device: torch.device) -> BaselinePlan:
    """Work out one rank's part of a case.

    Args:
        case: The case.
        topk_idx: `[num_ranks, num_tokens, num_topk]` on the CPU: the routing of all ranks.
        rank: This rank.
        device: Where the plan's tensors go.
    """
    dst_rank = torch.where(topk_idx >= 0, topk_idx // case.num_local_experts, -1)
    # [num_tokens, num_ranks]: whether this rank sends that token there.
    is_sent = torch.stack([(dst_rank[rank] == peer).any(1) for peer in range(case.num_ranks)], dim=1)
    # [num_ranks, num_tokens]: whether that token of that rank comes here.
    is_received = (dst_rank == rank).any(2)
    expert_rows = None
    if case.layout == "expert":
        local_idx = local_expert_idx(topk_idx[is_received], rank=rank, num_local_experts=case.num_local_experts)
        layout = layout_experts(
            local_idx, num_local_experts=case.num_local_experts, expert_alignment=case.expert_alignment
        )
        recv_row, position = (layout.row_idx >= 0).nonzero(as_tuple=True)
        expert_rows = ExpertRows(
            num_rows=int(layout.num_aligned_rows.sum()),
            expert_row=layout.row_idx[recv_row, position].to(device),
            recv_row=recv_row.to(device),
        )
    return BaselinePlan(
        num_tokens=case.num_tokens,
        send_token_idx=is_sent.t().nonzero()[:, 1].to(device),
        num_send_rows=is_sent.sum(0).tolist(),
        num_recv_rows=is_received.sum(1).tolist(),
        recv_source=is_received.flatten().nonzero()[:, 0].to(device),
        num_summands=(is_sent.sum(1) if case.layout == "token" else (topk_idx[rank] >= 0).sum(1)).to(device),
        expert_rows=expert_rows,
    )


def dispatch(rows: torch.Tensor, plan: BaselinePlan, group: dist.ProcessGroup) -> torch.Tensor:
    """Send `[num_tokens, ...]` rows to their ranks, and lay them out by expert if the plan says so.

    Collective: yes.

    Returns:
        The received rows, ordered by (source rank, token), or by expert and in that order inside; padding is not
        initialised.
    """
    sent = rows.index_select(0, plan.send_token_idx)
    received = rows.new_empty(sum(plan.num_recv_rows), *rows.shape[1:])
    dist.all_to_all_single(received, sent, plan.num_recv_rows, plan.num_send_rows, group=group)
    if plan.expert_rows is None:
        return received
    by_expert = rows.new_empty(plan.expert_rows.num_rows, *rows.shape[1:])
    by_expert[plan.expert_rows.expert_row] = received.index_select(0, plan.expert_rows.recv_row)
    return by_expert


def combine(rows: torch.Tensor, plan: BaselinePlan, group: dist.ProcessGroup) -> torch.Tensor:
    """Bring rows that lie as `dispatch` returned them back to their tokens, and add them up in their own dtype.

    Collective: yes.

    Returns:
        `[num_tokens, ...]`.
    """
    if plan.expert_rows is not None:
        by_expert = rows.index_select(0, plan.expert_rows.expert_row)
        rows = rows.new_zeros(sum(plan.num_recv_rows), *rows.shape[1:])
        rows.index_add_(0, plan.expert_rows.recv_row, by_expert)
    returned = rows.new_empty(len(plan.send_token_idx), *rows.shape[1:])
    dist.all_to_all_single(returned, rows, plan.num_send_rows, plan.num_recv_rows, group=group)
    return rows.new_zeros(plan.num_tokens, *rows.shape[1:]).index_add_(0, plan.send_token_idx, returned)
