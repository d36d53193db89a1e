"""Owns the collective backend of the normal calls: rows move by messages of any `torch.distributed` group.

Rows go straight to their ranks, one node or several. Row counts are always read on the host, so a CUDA graph cannot
capture it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.refusals import rejected
from deep_ep_core.topology import Topology
from deep_ep_core.transport import AgreedField, CollectiveTransport, Operation, Rows
from deep_ep_legacy.checks import BufferFacts, CombineArgs, DispatchArgs, check_counts
from deep_ep_legacy.handles import Handle, InternodeHandle, IntranodeHandle, RoutingPlan, plan_of
from deep_ep_legacy.layout import (
    DispatchLayout,
    channel_ends,
    dispatch_layout,
    queue_position,
    received_channel_starts,
)

__all__ = ["OPERATIONS", "CollectiveBackend", "DispatchResult", "agreed_by_combine", "agreed_by_dispatch"]

OPERATIONS = ("open", "dispatch", "combine")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchResult:
    """What a dispatch gives; the routing's items are None for a cached one, but for the handle."""

    recv_x: torch.Tensor
    recv_sf: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    num_recv_tokens_per_expert: list[int] | None
    handle: Handle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Counts:
    """What the ranks told each other of a new routing, by rank.

    Attributes:
        num_src_tokens: Tokens that each rank has.
        num_node_tokens: Tokens that each rank sends to this rank's node.
        sent: `[num_ranks, num_ranks]` int64: rows from rank i to rank j.
        num_expert_tokens: `[num_local_experts]` int64: selections of the local experts by all ranks.
    """

    num_src_tokens: list[int]
    num_node_tokens: list[int]
    sent: torch.Tensor
    num_expert_tokens: torch.Tensor


class CollectiveBackend:
    """Moves rows with point-to-point messages of the group's own backend.

    Args:
        transport: The group's transport; its operations are `OPERATIONS`.
        topology: Which ranks share a node.
        facts: What the checks know.
    """

    def __init__(self, transport: CollectiveTransport, topology: Topology, facts: BufferFacts) -> None:
        self._transport = transport
        self._topology = topology
        self._facts = facts
        self._rank = transport.rank

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation."""
        self._transport.report_rejection(operation, reason)

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        """Count how many tokens go where."""
        return dispatch_layout(
            topk_idx, num_experts=num_experts, num_ranks=self._facts.num_ranks, num_nodes=self._facts.num_nodes
        )

    # Dispatch

    def dispatch(self, args: DispatchArgs) -> DispatchResult:
        """Send each token to its ranks, and take theirs, ordered by (source rank, token)."""
        if args.handle is not None:
            plan = plan_of(args.handle, self._rank)
            operation = self._begin("dispatch", agreed_by_dispatch(args), plan)
            received = operation.exchange(_row_parts(args, plan), plan.num_send_rows, plan.num_recv_rows, "payload")
            return DispatchResult(
                recv_x=_as_rows(received[0], args.x),
                recv_sf=_padded(received[1], plan.num_rows) if args.sf is not None else None,
                recv_topk_idx=None,
                recv_topk_weights=None,
                num_recv_tokens_per_expert=None,
                handle=args.handle,
            )
        check_counts(self._facts, args)
        return self._dispatch_new(args)

    def _dispatch_new(self, args: DispatchArgs) -> DispatchResult:
        rank, num_ranks = self._rank, self._topology.num_ranks
        operation, counts = self._exchange_counts(args)
        num_recv_rows = counts.sent[:, rank].tolist()
        num_recv = sum(num_recv_rows)
        plan = RoutingPlan(
            send_token_idx=args.is_token_in_rank.t().nonzero()[:, 1],
            num_send_rows=counts.sent[rank].tolist(),
            num_recv_rows=num_recv_rows,
            num_rows=args.num_worst_tokens or num_recv,
        )
        parts = _row_parts(args, plan)
        parts.append(Rows(self._source_records(args)[plan.send_token_idx]))
        if args.topk_idx is not None and args.topk_weights is not None:
            parts += [Rows(args.topk_idx[plan.send_token_idx]), Rows(args.topk_weights[plan.send_token_idx])]
        received = operation.exchange(parts, plan.num_send_rows, plan.num_recv_rows, "payload")
        recv_x = _as_rows(received.pop(0), args.x)
        recv_sf = None if args.sf is None else _padded(received.pop(0), plan.num_rows)
        records = received.pop(0)
        recv_idx, recv_weights = None, None
        if received:
            num_local = len(counts.num_expert_tokens)
            local_idx = received[0] - rank * num_local
            is_local = (local_idx >= 0) & (local_idx < num_local)
            recv_idx = _padded(torch.where(is_local, local_idx, -1), plan.num_rows, fill=-1)
            recv_weights = _padded(torch.where(is_local, received[1], 0), plan.num_rows)
        num_experts_tokens: list[int] = []
        if not args.num_worst_tokens:
            alignment = args.expert_alignment
            num_experts_tokens = ((counts.num_expert_tokens + alignment - 1) // alignment * alignment).tolist()
        make_handle = self._make_handle if num_ranks == self._topology.num_scaleup_ranks else self._make_wide_handle
        return DispatchResult(
            recv_x=recv_x,
            recv_sf=recv_sf,
            recv_topk_idx=recv_idx,
            recv_topk_weights=recv_weights,
            num_recv_tokens_per_expert=num_experts_tokens,
            handle=make_handle(args, plan, counts, records),
        )

    def _exchange_counts(self, args: DispatchArgs) -> tuple[Operation, _Counts]:
        """Open a new routing: every rank learns how many rows go from each rank to each, so all judge alike."""
        assert args.num_tokens_per_expert is not None, "a new routing has counts"
        num_ranks = self._topology.num_ranks
        sent = args.is_token_in_rank.sum(0)
        to_node = self._is_in_node(args.is_token_in_rank).sum(0).tolist()
        values = [
            [len(args.x), to_node[rank // self._topology.num_scaleup_ranks], args.num_worst_tokens]
            for rank in range(num_ranks)
        ]
        operation = self._transport.begin("dispatch", agreed_by_dispatch(args), values)
        per_rank = args.num_tokens_per_expert.long().view(num_ranks, -1)
        rows = torch.cat([sent.expand(num_ranks, num_ranks), per_rank], dim=1)
        ones = [1] * num_ranks
        heard = operation.exchange_rows(rows, ones, ones, "counts")
        counts = _Counts(
            num_src_tokens=[values[0] for values in operation.peer_values],
            num_node_tokens=[values[1] for values in operation.peer_values],
            sent=heard[:, :num_ranks],
            num_expert_tokens=heard[:, num_ranks:].sum(0),
        )
        bounds = [values[2] for values in operation.peer_values]
        for rank, (num_rows, bound) in enumerate(zip(counts.sent.sum(0).tolist(), bounds, strict=True)):
            if bound and num_rows > bound:
                raise rejected(
                    self._rank,
                    f"num_worst_tokens must be at least the {num_rows} tokens that rank {rank} receives",
                    bound,
                    "nothing was sent, pass the most tokens of a rank times the number of ranks",
                )
        return operation, counts

    def _is_in_node(self, is_token_in_rank: torch.Tensor) -> torch.Tensor:
        """`[num_tokens, num_nodes]` bool."""
        topology = self._topology
        return is_token_in_rank.view(-1, topology.num_scaleout_ranks, topology.num_scaleup_ranks).any(2)

    def _source_records(self, args: DispatchArgs) -> torch.Tensor:
        """`[num_tokens, 1 + num_nodes]` int32: a token's index, and for each node a mask of its ranks that get it."""
        topology, num_tokens, device = self._topology, len(args.x), args.x.device
        token_idx = torch.arange(num_tokens, dtype=torch.int32, device=device).unsqueeze(1)
        if topology.num_scaleout_ranks == 1:
            return token_idx
        # A mask has 32 bits; more ranks of a node than that leave its higher part out, and nothing here reads it.
        bits = 2 ** torch.arange(topology.num_scaleup_ranks, device=device).clamp(max=32)
        routing = args.is_token_in_rank.view(num_tokens, topology.num_scaleout_ranks, topology.num_scaleup_ranks)
        masks = ((routing * bits).sum(2) & 0xFFFFFFFF).to(torch.int32)
        return torch.cat([token_idx, masks], dim=1)

    def _make_handle(
        self, args: DispatchArgs, plan: RoutingPlan, counts: _Counts, records: torch.Tensor
    ) -> IntranodeHandle:
        num_channels, src_idx = args.config.num_channels, records[:, 0]
        return IntranodeHandle(
            rank_prefix_matrix=counts.sent.cumsum(0).to(torch.int32),
            channel_prefix_matrix=channel_ends(args.is_token_in_rank, num_channels),
            recv_channel_prefix_matrix=received_channel_starts(
                src_idx, plan.num_recv_rows, counts.num_src_tokens, num_channels
            ),
            recv_src_idx=_padded(src_idx, plan.num_rows, fill=-1),
            is_token_in_rank=args.is_token_in_rank,
            send_head=queue_position(args.is_token_in_rank, num_channels),
        )

    def _make_wide_handle(
        self, args: DispatchArgs, plan: RoutingPlan, counts: _Counts, records: torch.Tensor
    ) -> InternodeHandle:
        topology, num_channels, device = self._topology, args.config.num_channels, args.x.device
        is_in_node = self._is_in_node(args.is_token_in_rank)
        ends = counts.sent[:, self._rank].cumsum(0)
        starts = received_channel_starts(records[:, 0], plan.num_recv_rows, counts.num_src_tokens, num_channels)
        src_rank = torch.repeat_interleave(torch.tensor(plan.num_recv_rows, device=device))
        src_node = (src_rank // topology.num_scaleup_ranks).to(torch.int32)
        meta = torch.stack([src_node, records[:, 1 + topology.scaleout_rank]], dim=1)
        # The ranks with this one's index in their nodes: V1 sends over RDMA between those only.
        forwarded = counts.num_node_tokens[topology.scaleup_rank :: topology.num_scaleup_ranks]
        per_node = torch.tensor(forwarded, dtype=torch.int32, device=device).cumsum(0).to(torch.int32)
        shape = (topology.num_scaleout_ranks, num_channels)
        return InternodeHandle(
            is_token_in_rank=args.is_token_in_rank,
            rdma_channel_prefix_matrix=channel_ends(is_in_node, num_channels),
            gbl_channel_prefix_matrix=channel_ends(args.is_token_in_rank, num_channels),
            recv_rdma_channel_prefix_matrix=torch.full(shape, -1, dtype=torch.int32, device=device),
            recv_rdma_rank_prefix_sum=per_node,
            recv_gbl_channel_prefix_matrix=(starts + (ends - counts.sent[:, self._rank]).unsqueeze(1)).to(torch.int32),
            recv_gbl_rank_prefix_sum=ends.to(torch.int32),
            recv_src_meta=meta.view(torch.uint8).view(-1, 8),
            send_rdma_head=queue_position(is_in_node, num_channels),
            send_nvl_head=torch.full(
                (sum(forwarded), topology.num_scaleup_ranks), -1, dtype=torch.int32, device=device
            ),
        )

    # Combine

    def combine(self, args: CombineArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Bring rows back to the ranks of their tokens, and sum them by increasing rank, biases first."""
        plan, weights = plan_of(args.handle, self._rank), args.topk_weights
        # What is sent is what was received once.
        back = RoutingPlan(
            send_token_idx=plan.send_token_idx,
            num_send_rows=plan.num_recv_rows,
            num_recv_rows=plan.num_send_rows,
            num_rows=plan.num_rows,
        )
        operation = self._begin("combine", agreed_by_combine(args), back)
        num_rows = sum(back.num_send_rows)
        parts = [Rows(args.x[:num_rows])]
        if weights is not None:
            parts.append(Rows(weights[:num_rows]))
        received = operation.exchange(parts, back.num_send_rows, back.num_recv_rows, "rows back")
        num_tokens = len(args.handle.is_token_in_rank)
        combined = _sum_by_rank(received[0], plan, num_tokens, args.biases).to(args.x.dtype)
        return combined, None if weights is None else _sum_by_rank(received[1], plan, num_tokens, ())

    def _begin(self, name: str, fields: Sequence[AgreedField], plan: RoutingPlan) -> Operation:
        """Open an operation with a known routing, and make sure that the peers know the same one."""
        # Both what is sent and what is expected, so that both ends of a difference see it.
        known = list(zip(plan.num_send_rows, plan.num_recv_rows, strict=True))
        operation = self._transport.begin(name, fields, known)
        heard = [(num_expected, num_sent) for num_sent, num_expected in operation.peer_values]
        if heard != known:
            raise rejected(
                self._rank,
                "handle must be of the same dispatch on every rank: by this one the rows that go to each rank and come "
                f"from it are {known}",
                heard,
                "pass the handles of one dispatch",
            )
        return operation


def agreed_by_combine(args: CombineArgs) -> list[AgreedField]:
    """The values of a combine that every rank must pass alike."""
    num_columns = 0 if args.topk_weights is None else args.topk_weights.size(1)
    return [
        AgreedField(name="hidden", value=args.x.size(1)),
        AgreedField(name="number of columns of topk_weights", value=num_columns),
    ]


def agreed_by_dispatch(args: DispatchArgs) -> list[AgreedField]:
    """The values of a dispatch that every rank must pass alike."""
    num_experts = 0 if args.num_tokens_per_expert is None else len(args.num_tokens_per_expert)
    sf_dtype = None if args.sf is None else args.sf.dtype
    return [
        AgreedField(name="use of a handle", value=int(args.handle is not None), show=lambda value: str(bool(value))),
        AgreedField(name="hidden", value=args.x.size(1)),
        AgreedField.of_dtype("dtype of x", args.x.dtype),
        AgreedField(name="number of scales", value=0 if args.sf is None else args.sf.size(1)),
        AgreedField.of_dtype("dtype of the scales", sf_dtype),
        AgreedField(name="num_experts", value=num_experts),
        AgreedField(name="num_topk", value=0 if args.topk_idx is None else args.topk_idx.size(1)),
        AgreedField.of_dtype("dtype of topk_idx", None if args.topk_idx is None else args.topk_idx.dtype),
    ]


def _row_parts(args: DispatchArgs, plan: RoutingPlan) -> list[Rows]:
    """The rows to send, and their scales; the rows are received into a tensor of the result's size."""
    x = args.x
    num_words = x.size(1) * x.element_size() // 8
    if x.storage_offset() * x.element_size() % 8 != 0:
        x = x.clone()
    # As 8-byte words: torch cannot index every dtype that may come. An empty tensor may have strides without a view.
    words = x.view(torch.int64) if len(x) else x.new_empty((0, num_words), dtype=torch.int64)
    parts = [Rows(words[plan.send_token_idx], words.new_empty(plan.num_rows, num_words))]
    if args.sf is not None:
        parts.append(Rows(args.sf[plan.send_token_idx].contiguous()))
    return parts


def _as_rows(words: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Received words as rows of the dtype of `x`."""
    return words.view(x.dtype) if len(words) else x.new_empty((0, x.size(1)))


def _padded(rows: torch.Tensor, num_rows: int, *, fill: int = 0) -> torch.Tensor:
    """The rows at the head of a tensor of `num_rows`, `fill` in the rest; the rows themselves if they fill it."""
    if len(rows) == num_rows:
        return rows.contiguous()
    out = rows.new_full((num_rows, *rows.shape[1:]), fill)
    out[: len(rows)] = rows
    return out


def _sum_by_rank(
    rows: torch.Tensor, plan: RoutingPlan, num_tokens: int, biases: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Sum, for each token, the rows that came back for it: float32, biases first, then by increasing rank.

    Args:
        rows: `[num_sent, width]`, ordered by (rank that returns them, token).
        plan: The routing of the dispatch.
        num_tokens: Tokens of this rank.
        biases: Each `[num_tokens, width]`.
    """
    total = torch.zeros(num_tokens, rows.size(1), dtype=torch.float32, device=rows.device)
    for bias in biases:
        total += bias
    chunks = zip(rows.split(plan.num_send_rows), plan.send_token_idx.split(plan.num_send_rows), strict=True)
    for chunk, token_idx in chunks:
        # A token occurs once in what a rank returns, so the sum has one order.
        total[token_idx] += chunk.float()
    return total
