"""Owns the two handles of V1: what a dispatch tells of its routing, and what later calls read from it.

Handles are plain tuples of tensors, as V1's callers keep and save them; any tuple of the same content is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

__all__ = ["Handle", "InternodeHandle", "IntranodeHandle", "RoutingPlan", "as_handle", "num_rows_of", "plan_of"]


class IntranodeHandle(NamedTuple):
    """The routing of a dispatch inside one node. R ranks, N tokens, M received rows, C channels.

    Attributes:
        rank_prefix_matrix: `[R, R]` int32: rows that ranks 0 to i sent to rank j; the last row has the totals.
        channel_prefix_matrix: `[R, C]` int32: own tokens for rank j in channels 0 to c.
        recv_channel_prefix_matrix: `[R, C]` int32: where channel c begins inside the rows from rank i.
        recv_src_idx: `[M]` int32: token of each received row on its source rank; -1 past the received rows.
        is_token_in_rank: `[N, R]` bool: the routing itself.
        send_head: `[N, R]` int32: position of token t among those of its channel for rank j, or -1.
    """

    rank_prefix_matrix: torch.Tensor
    channel_prefix_matrix: torch.Tensor
    recv_channel_prefix_matrix: torch.Tensor
    recv_src_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    send_head: torch.Tensor


class InternodeHandle(NamedTuple):
    """The routing of a dispatch between nodes. B nodes, and the letters of `IntranodeHandle`.

    Two items describe queues of ranks that forward rows inside their node. The collective backend sends rows straight
    to their ranks, so these are -1 throughout.

    Attributes:
        is_token_in_rank: `[N, R]` bool: the routing itself.
        rdma_channel_prefix_matrix: `[B, C]` int32: own tokens for node b in channels 0 to c.
        gbl_channel_prefix_matrix: `[R, C]` int32: own tokens for rank j in channels 0 to c.
        recv_rdma_channel_prefix_matrix: `[B, C]` int32: of a queue; -1.
        recv_rdma_rank_prefix_sum: `[B]` int32: tokens that ranks of this rank's index on nodes 0 to b send to its node.
        recv_gbl_channel_prefix_matrix: `[R, C]` int32: first received row of (source rank, channel).
        recv_gbl_rank_prefix_sum: `[R]` int32: rows received from ranks 0 to i.
        recv_src_meta: `[M, 8]` uint8, two int32 a row: the source node, and a mask of the ranks of this node that get
            the token.
        send_rdma_head: `[N, B]` int32: position of token t among those of its channel for node b, or -1.
        send_nvl_head: `[recv_rdma_rank_prefix_sum[-1], ranks of a node]` int32: of a queue; -1.
    """

    is_token_in_rank: torch.Tensor
    rdma_channel_prefix_matrix: torch.Tensor
    gbl_channel_prefix_matrix: torch.Tensor
    recv_rdma_channel_prefix_matrix: torch.Tensor
    recv_rdma_rank_prefix_sum: torch.Tensor
    recv_gbl_channel_prefix_matrix: torch.Tensor
    recv_gbl_rank_prefix_sum: torch.Tensor
    recv_src_meta: torch.Tensor
    send_rdma_head: torch.Tensor
    send_nvl_head: torch.Tensor


Handle = IntranodeHandle | InternodeHandle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingPlan:
    """What moving rows needs of a routing.

    Attributes:
        send_token_idx: `[num_sent]` int64: own tokens, ordered by (destination rank, token).
        num_send_rows: Rows for each rank.
        num_recv_rows: Rows from each rank.
        num_rows: Rows of the received tensors; more than arrive, where they are sized for the worst case.
    """

    send_token_idx: torch.Tensor
    num_send_rows: list[int]
    num_recv_rows: list[int]
    num_rows: int


def as_handle(value: Any, *, num_ranks: int, num_nodes: int) -> Handle | None:
    """The handle that a tuple or list is, or None if it is none of these ranks and nodes."""
    kind: type[Handle] = InternodeHandle if num_nodes > 1 else IntranodeHandle
    if not isinstance(value, (tuple, list)) or len(value) != len(kind._fields):
        return None
    if not all(isinstance(item, torch.Tensor) for item in value):
        return None
    handle = kind(*value)
    routing = handle.is_token_in_rank
    is_right = routing.dtype == torch.bool and routing.dim() == 2 and routing.size(1) == num_ranks
    counts = handle.rank_prefix_matrix if isinstance(handle, IntranodeHandle) else handle.recv_gbl_rank_prefix_sum
    shape = (num_ranks, num_ranks) if isinstance(handle, IntranodeHandle) else (num_ranks,)
    return handle if is_right and counts.shape == shape else None


def num_rows_of(handle: Handle) -> int:
    """Rows of the received tensors, as of `RoutingPlan`; no wait."""
    return len(handle.recv_src_idx if isinstance(handle, IntranodeHandle) else handle.recv_src_meta)


def plan_of(handle: Handle, rank: int) -> RoutingPlan:
    """The plan that a handle holds; waits for the counts where they lie on a device."""
    if isinstance(handle, IntranodeHandle):
        ends = handle.rank_prefix_matrix[:, rank]
    else:
        ends = handle.recv_gbl_rank_prefix_sum
    is_sent = handle.is_token_in_rank
    return RoutingPlan(
        send_token_idx=is_sent.t().nonzero()[:, 1],
        num_send_rows=is_sent.sum(0).tolist(),
        num_recv_rows=ends.diff(prepend=ends.new_zeros(1)).tolist(),
        num_rows=num_rows_of(handle),
    )
