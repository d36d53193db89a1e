"""Owns the arithmetic of routing on one rank: who gets which token, and where each received row belongs.

Plain integer torch, no communication. Every order that the library promises is made here: rows travel ordered by
(destination rank, token), arrive ordered by (source rank, token), and lie in an expert's rows in that same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "ExpertLayout",
    "SendRouting",
    "align_up_tensor",
    "last_of_each_group",
    "layout_experts",
    "local_expert_idx",
    "route_tokens",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SendRouting:
    """Where this rank's tokens go.

    Attributes:
        send_token_idx: `[num_sent]` int64, ordered by (destination rank, token).
        num_send_rows: `[num_ranks]` int64: rows for each rank.
        slot_idx: `[num_tokens, num_topk]` int64: the token's position among those for that entry's rank; -1 if none.
        sent_row_idx: `[num_tokens, num_topk]` int64: its position among all sent rows; -1 if none.
        is_master: `[num_tokens, num_topk]` bool: last entry of the token with its destination rank.
    """

    send_token_idx: torch.Tensor
    num_send_rows: torch.Tensor
    slot_idx: torch.Tensor
    sent_row_idx: torch.Tensor
    is_master: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertLayout:
    """Where received rows lie by expert.

    Attributes:
        num_rows: `[num_local_experts]` int64: real rows of each expert.
        num_aligned_rows: `[num_local_experts]` int64: the same, rounded up to the alignment.
        start_idx: `[num_local_experts]` int64: first row of each expert.
        row_idx: `[num_recv, num_topk]` int64: expert-major row of each local top-k entry, -1 elsewhere.
    """

    num_rows: torch.Tensor
    num_aligned_rows: torch.Tensor
    start_idx: torch.Tensor
    row_idx: torch.Tensor


def last_of_each_group(group_idx: torch.Tensor) -> torch.Tensor:
    """Mark, in each row, the last entry of every distinct non-negative value.

    Args:
        group_idx: `[num_tokens, num_topk]` integers; negative means "none".

    Returns:
        `[num_tokens, num_topk]` bool.
    """
    num_topk = group_idx.size(1)
    is_last = group_idx >= 0
    for later in range(1, num_topk):
        # An entry is not the last if any entry `later` places behind has its value.
        is_last[:, : num_topk - later] &= group_idx[:, : num_topk - later] != group_idx[:, later:]
    return is_last


def route_tokens(topk_idx: torch.Tensor, *, num_ranks: int, num_local_experts: int) -> SendRouting:
    """Send each token once to every rank that hosts one of its experts.

    Args:
        topk_idx: `[num_tokens, num_topk]` global expert ids; negative means "not selected".
        num_ranks: Number of ranks.
        num_local_experts: Experts of each rank; expert e lives on rank e // num_local_experts.
    """
    dst_rank = torch.where(topk_idx >= 0, topk_idx.long() // num_local_experts, -1)
    num_tokens = dst_rank.size(0)
    is_sent = torch.zeros(num_tokens, num_ranks + 1, dtype=torch.bool, device=topk_idx.device)
    # Column -1, the last, takes the entries that select nothing, and is dropped.
    is_sent.scatter_(1, torch.where(dst_rank >= 0, dst_rank, num_ranks), True)
    is_sent = is_sent[:, :num_ranks]
    # A copy: the column is a view of both, and operators return this tensor, which must begin its own memory.
    send_token_idx = is_sent.t().nonzero()[:, 1].clone()
    num_send_rows = is_sent.sum(0)
    slot_of_rank = is_sent.long().cumsum(0) - 1
    first_row_of_rank = num_send_rows.cumsum(0) - num_send_rows
    safe_rank = dst_rank.clamp(min=0)
    slot_idx = torch.where(dst_rank >= 0, slot_of_rank.gather(1, safe_rank), -1)
    sent_row_idx = torch.where(dst_rank >= 0, slot_idx + first_row_of_rank[safe_rank], -1)
    return SendRouting(
        send_token_idx=send_token_idx,
        num_send_rows=num_send_rows,
        slot_idx=slot_idx,
        sent_row_idx=sent_row_idx,
        is_master=last_of_each_group(dst_rank),
    )


def local_expert_idx(topk_idx: torch.Tensor, *, rank: int, num_local_experts: int) -> torch.Tensor:
    """Local expert index of each entry that this rank hosts, -1 elsewhere; of the same shape and dtype."""
    local_idx = topk_idx - rank * num_local_experts
    return torch.where((local_idx >= 0) & (local_idx < num_local_experts), local_idx, -1)


def layout_experts(local_idx: torch.Tensor, *, num_local_experts: int, expert_alignment: int) -> ExpertLayout:
    """Lay received rows out by expert, in their received order inside each expert.

    Args:
        local_idx: `[num_recv, num_topk]` local expert of each entry, -1 where it is not local.
        num_local_experts: Experts of this rank.
        expert_alignment: Each expert starts at a multiple of this.
    """
    row, column = (local_idx >= 0).nonzero(as_tuple=True)
    expert = local_idx[row, column].long()
    num_rows = torch.bincount(expert, minlength=num_local_experts)
    num_aligned_rows = align_up_tensor(num_rows, expert_alignment)
    start_idx = num_aligned_rows.cumsum(0) - num_aligned_rows
    # `nonzero` lists entries by row; a stable sort by expert keeps that order inside each expert.
    order = expert.argsort(stable=True)
    first_of_expert = num_rows.cumsum(0) - num_rows
    position = torch.arange(len(order), device=local_idx.device) - first_of_expert[expert[order]]
    row_idx = torch.full(local_idx.shape, -1, dtype=torch.int64, device=local_idx.device)
    row_idx[row[order], column[order]] = start_idx[expert[order]] + position
    return ExpertLayout(num_rows=num_rows, num_aligned_rows=num_aligned_rows, start_idx=start_idx, row_idx=row_idx)


def align_up_tensor(values: torch.Tensor, alignment: int) -> torch.Tensor:
    """Each value rounded up to a multiple of `alignment`."""
    return (values + alignment - 1) // alignment * alignment
