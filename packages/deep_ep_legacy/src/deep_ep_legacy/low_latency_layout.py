"""Owns where rows of low-latency calls lie: at the sender, at the receiver, and back. Plain torch; it moves nothing.

Rows travel one for each selection, ordered by expert and, inside an expert, by token. So both sides know every place
from counts, and the packed layout is the same in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PackedPlaces", "Selections", "rows_to_return", "select", "sum_in_topk_order"]

_COUNT_BITS = 32
_COUNT_MASK = (1 << _COUNT_BITS) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Selections:
    """The selections of this rank's tokens, ordered by expert and token.

    Attributes:
        entry_idx: int64 `[num_selections]`: position in the flattened `topk_idx`.
        token_idx: int64 `[num_selections]`.
        expert_idx: int64 `[num_selections]`.
        rank_idx: int64 `[num_selections]`: the rank of the expert.
        num_of_rank: By rank, how many are for its experts.
    """

    entry_idx: torch.Tensor
    token_idx: torch.Tensor
    expert_idx: torch.Tensor
    rank_idx: torch.Tensor
    num_of_rank: list[int]


def select(topk_idx: torch.Tensor, *, num_local_experts: int, is_active: list[bool]) -> Selections:
    """List the selections; those of experts on ranks that are not active are left out.

    Args:
        topk_idx: `[num_tokens, num_topk]`, -1 for no selection.
        num_local_experts: Experts of each rank.
        is_active: By rank.
    """
    experts = topk_idx.reshape(-1).long()
    active = torch.tensor(is_active, device=topk_idx.device)
    is_selected = (experts >= 0) & active[experts.clamp_min(0) // num_local_experts]
    entry_idx = is_selected.nonzero()[:, 0]
    experts = experts[entry_idx]
    # Stable, so tokens stay in order.
    experts, order = experts.sort(stable=True)
    entry_idx = entry_idx[order]
    rank_idx = experts // num_local_experts
    return Selections(
        entry_idx=entry_idx,
        token_idx=entry_idx // topk_idx.size(1),
        expert_idx=experts,
        rank_idx=rank_idx,
        num_of_rank=torch.bincount(rank_idx, minlength=len(is_active)).tolist(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedPlaces:
    """Where rows that arrived lie in the packed layout.

    Attributes:
        local_expert_idx: int64 `[num_rows]`: the expert of each row.
        row_idx: int64 `[num_rows]`: its row among those of the expert.
        num_rows: int32 `[num_local_experts]`: rows of each expert.
        layout_range: int64 `[num_local_experts, num_ranks]`: rows of each source rank in the low 32 bits, the first
            one in the high 32 bits.
    """

    local_expert_idx: torch.Tensor
    row_idx: torch.Tensor
    num_rows: torch.Tensor
    layout_range: torch.Tensor

    @classmethod
    def of(
        cls, local_expert_idx: torch.Tensor, src_rank: torch.Tensor, *, num_ranks: int, num_local_experts: int
    ) -> PackedPlaces:
        """Lay out rows that are ordered by source rank, expert and token.

        Args:
            local_expert_idx: `[num_rows]`.
            src_rank: int64 `[num_rows]`.
            num_ranks: Ranks of the group.
            num_local_experts: Experts of this rank.
        """
        local_expert_idx = local_expert_idx.long()
        block_idx = src_rank * num_local_experts + local_expert_idx
        counts = torch.bincount(block_idx, minlength=num_ranks * num_local_experts)
        first_arrived = counts.cumsum(0) - counts
        by_rank = counts.view(num_ranks, num_local_experts)
        first_row = by_rank.cumsum(0) - by_rank
        in_block = torch.arange(len(block_idx), device=block_idx.device) - first_arrived[block_idx]
        return cls(
            local_expert_idx=local_expert_idx,
            row_idx=first_row.view(-1)[block_idx] + in_block,
            num_rows=by_rank.sum(0).to(torch.int32),
            layout_range=((first_row << _COUNT_BITS) | by_rank).t().contiguous(),
        )


def rows_to_return(layout_range: torch.Tensor, rows_per_expert: int) -> tuple[torch.Tensor, list[int]]:
    """The rows of the packed layout in the order in which they go back.

    Args:
        layout_range: As in `PackedPlaces`.
        rows_per_expert: Rows that the layout has for each expert.

    Returns:
        `(row_idx, num_of_rank)`: int64 row of the flattened layout, ordered by source rank, expert and token; and how
        many go to each rank.
    """
    by_rank = layout_range.t().contiguous()
    counts, first_row = by_rank & _COUNT_MASK, by_rank >> _COUNT_BITS
    expert_start = torch.arange(by_rank.size(1), device=by_rank.device) * rows_per_expert
    first = (first_row + expert_start).view(-1)
    flat_counts = counts.view(-1)
    first_returned = flat_counts.cumsum(0) - flat_counts
    shift = (first - first_returned).repeat_interleave(flat_counts)
    return torch.arange(len(shift), device=shift.device) + shift, counts.sum(1).tolist()


def sum_in_topk_order(
    rows: torch.Tensor, row_of_entry: torch.Tensor, topk_weights: torch.Tensor, out: torch.Tensor
) -> None:
    """Sum each token's rows times their weights in float32, in ascending top-k position, and round once.

    Args:
        rows: `[num_rows, hidden]` bfloat16 or float32.
        row_of_entry: int64 `[num_tokens, num_topk]`: the row of each selection, -1 for none.
        topk_weights: float32 `[num_tokens, num_topk]`.
        out: `[num_tokens, hidden]`, written; 0 for a token without rows.
    """
    acc = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for k in range(row_of_entry.size(1)):
        token_idx = (row_of_entry[:, k] >= 0).nonzero()[:, 0]
        weighted = rows[row_of_entry[token_idx, k]].float() * topk_weights[token_idx, k].unsqueeze(1)
        acc.index_add_(0, token_idx, weighted)
    out.copy_(acc)
