"""Owns the sums of combine, to the bit: which rows are added, in which order, and where they are rounded.

The order of every sum is ascending top-k position; several entries of a token that one rank (or node) serves together
count at the position of the last of them. Accumulation is in float32 (float64 for float64 rows), starts at zero, takes
the bias first, and is rounded once. `docs/concepts/reduction-order.md` says the same in words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deep_ep_ep.routing import last_of_each_group

__all__ = ["COMBINE_DTYPES", "reduce_at_source", "sum_rows_in_order"]

COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def sum_rows_in_order(rows: torch.Tensor, row_idx: torch.Tensor, biases: Sequence[torch.Tensor] = ()) -> torch.Tensor:
    """Sum, for each token, its rows in ascending top-k position.

    Args:
        rows: `[num_rows, hidden]`.
        row_idx: `[num_tokens, num_topk]` int64: the row to add at each position, -1 to add none.
        biases: Each `[num_tokens, hidden]`, of the rows' dtype; added first, in order.

    Returns:
        `[num_tokens, hidden]` of the rows' dtype; 0 for a token with no rows and no bias.
    """
    acc_dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    acc = torch.zeros(row_idx.size(0), rows.size(1), dtype=acc_dtype, device=rows.device)
    for bias in biases:
        acc += bias
    for k in range(row_idx.size(1)):
        token_idx = (row_idx[:, k] >= 0).nonzero()[:, 0]
        if len(token_idx):
            acc.index_add_(0, token_idx, rows[row_idx[token_idx, k]].to(acc_dtype))
    return acc.to(rows.dtype)


def reduce_at_source(
    rows: torch.Tensor,
    row_idx: torch.Tensor,
    dst_rank: torch.Tensor,
    biases: Sequence[torch.Tensor],
    *,
    ranks_per_node: int | None,
) -> torch.Tensor:
    """Sum the rows that came back for each token.

    Args:
        rows: `[num_rows, hidden]` as they came back.
        row_idx: `[num_tokens, num_topk]` int64: the row that stands at each position, -1 for none.
        dst_rank: `[num_tokens, num_topk]` int64: the rank that serves each position, -1 for none.
        biases: As in `sum_rows_in_order`.
        ranks_per_node: Reduce first over the ranks of each node, rounding there, and then over the nodes; None for one
            sum with one rounding.

    Returns:
        `[num_tokens, hidden]` of the rows' dtype.
    """
    if ranks_per_node is None:
        return sum_rows_in_order(rows, row_idx, biases)
    num_tokens = row_idx.size(0)
    node_idx = torch.where(dst_rank >= 0, dst_rank // ranks_per_node, -1)
    nodes = node_idx.unique()
    nodes = nodes[nodes >= 0]
    partial = [sum_rows_in_order(rows, torch.where(node_idx == node, row_idx, -1)) for node in nodes]
    stacked = torch.cat([*partial, rows.new_zeros(0, rows.size(1))])
    # Row of a (token, node) among the stacked partial sums.
    partial_idx = torch.searchsorted(nodes, node_idx) * num_tokens + torch.arange(
        num_tokens, device=rows.device
    ).unsqueeze(1)
    return sum_rows_in_order(stacked, torch.where(last_of_each_group(node_idx), partial_idx, -1), biases)
