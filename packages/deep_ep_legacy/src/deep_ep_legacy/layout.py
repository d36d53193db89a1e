"""Owns the arithmetic of a layout on one rank: who gets which token, and in which channel of V1 a token lies.

Plain integer torch, no communication.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from deep_ep_core.align import ceil_div

__all__ = [
    "DispatchLayout",
    "channel_ends",
    "dispatch_layout",
    "queue_position",
    "received_channel_starts",
    "topk_idx_t",
]

topk_idx_t = torch.int64
"""The usual dtype of top-k indices. int32 is accepted as well, call by call."""


class DispatchLayout(NamedTuple):
    """How many tokens go where.

    Attributes:
        num_tokens_per_rank: `[num_ranks]` int32.
        num_tokens_per_rdma_rank: `[num_nodes]` int32; None with one node.
        num_tokens_per_expert: `[num_experts]` int32.
        is_token_in_rank: `[num_tokens, num_ranks]` bool.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor


def dispatch_layout(topk_idx: torch.Tensor, *, num_experts: int, num_ranks: int, num_nodes: int) -> DispatchLayout:
    """Count the tokens of each rank, node and expert. Entries outside of [0, num_experts) select nothing.

    Args:
        topk_idx: `[num_tokens, num_topk]` integers.
        num_experts: Experts of all ranks, a multiple of `num_ranks`.
        num_ranks: Ranks of the group.
        num_nodes: Nodes of the group, of equally many ranks.
    """
    is_chosen = (topk_idx >= 0) & (topk_idx < num_experts)
    # No operation here needs a count on the host, so on CUDA nothing waits.
    experts = torch.where(is_chosen, topk_idx.long(), num_experts).flatten()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
    per_expert.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
    dst_rank = torch.where(is_chosen, topk_idx.long() // (num_experts // num_ranks), num_ranks)
    is_in_rank = torch.zeros(len(topk_idx), num_ranks + 1, dtype=torch.bool, device=topk_idx.device)
    # The last column takes the entries that select nothing, and is dropped.
    is_in_rank.scatter_(1, dst_rank, True)
    is_in_rank = is_in_rank[:, :num_ranks].contiguous()
    per_node = None
    if num_nodes > 1:
        per_node = is_in_rank.view(-1, num_nodes, num_ranks // num_nodes).any(2).sum(0).to(torch.int32)
    return DispatchLayout(
        num_tokens_per_rank=is_in_rank.sum(0).to(torch.int32),
        num_tokens_per_rdma_rank=per_node,
        # The last counts the entries that select nothing.
        num_tokens_per_expert=per_expert[:num_experts].clone(),
        is_token_in_rank=is_in_rank,
    )


def _by_channel(is_sent: torch.Tensor, num_channels: int) -> torch.Tensor:
    """`[num_channels, tokens_per_channel, num_dst]` of int64 from `[num_tokens, num_dst]`; zeros fill the last ones."""
    per_channel = ceil_div(len(is_sent), num_channels)
    padded = torch.zeros(num_channels * per_channel, is_sent.size(1), dtype=torch.int64, device=is_sent.device)
    padded[: len(is_sent)] = is_sent
    return padded.view(num_channels, per_channel, is_sent.size(1))


def channel_ends(is_sent: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Tokens for each destination in channels 0 to c: `[num_dst, num_channels]` int32.

    Args:
        is_sent: `[num_tokens, num_dst]` bool.
        num_channels: Channels; each has ceil(num_tokens / num_channels) consecutive tokens, the last ones fewer.
    """
    return _by_channel(is_sent, num_channels).sum(1).cumsum(0).t().to(torch.int32).contiguous()


def queue_position(is_sent: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Position of each token among those of its channel and destination, -1 where it is not sent.

    Returns:
        `[num_tokens, num_dst]` int32.
    """
    counts = _by_channel(is_sent, num_channels)
    position = (counts.cumsum(1) - counts).view(-1, is_sent.size(1))[: len(is_sent)]
    return torch.where(is_sent, position, -1).to(torch.int32)


def received_channel_starts(
    src_token_idx: torch.Tensor, num_recv_rows: list[int], num_src_tokens: list[int], num_channels: int
) -> torch.Tensor:
    """Where the rows of each channel begin inside the block of their source rank.

    Args:
        src_token_idx: `[num_recv]` token of each received row, in the order (source rank, token).
        num_recv_rows: Rows from each rank.
        num_src_tokens: Tokens that each rank had.
        num_channels: Channels.

    Returns:
        `[num_ranks, num_channels]` int32.
    """
    device, num_ranks = src_token_idx.device, len(num_recv_rows)
    per_channel = torch.tensor([max(ceil_div(num, num_channels), 1) for num in num_src_tokens], device=device)
    src_rank = torch.repeat_interleave(torch.tensor(num_recv_rows, device=device))
    cell = src_rank * num_channels + src_token_idx.long() // per_channel[src_rank]
    counts = torch.bincount(cell, minlength=num_ranks * num_channels).view(num_ranks, num_channels)
    return (counts.cumsum(1) - counts).to(torch.int32)
