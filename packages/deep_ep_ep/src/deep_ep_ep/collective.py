"""Owns the collective backend: dispatch and combine by row exchanges over any `torch.distributed` group.

It runs wherever torch runs and is the oracle for the others. Rows are gathered by destination, exchanged, and received
straight into place where the layout allows. Row counts are always read on the host, so a CUDA graph cannot capture it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.backend_choice import OPEN_DEVICE
from deep_ep_core.stream import CommScope
from deep_ep_core.topology import Topology
from deep_ep_core.transport import CollectiveTransport, Operation, Rows
from deep_ep_ep.agreed import agreed_by_combine, agreed_by_dispatch
from deep_ep_ep.backend import CombineResult, DispatchResult
from deep_ep_ep.checks import BufferFacts, CombineArgs, DispatchArgs, check_topk_values
from deep_ep_ep.handle import EPHandle, RoutingPlan
from deep_ep_ep.quant import new_tma_aligned_col_major
from deep_ep_ep.reduction import reduce_at_source, sum_rows_in_order
from deep_ep_ep.routing import align_up_tensor, layout_experts, local_expert_idx, route_tokens
from deep_ep_ep.sizing import max_expanded_tokens, max_recv_tokens

__all__ = ["OPERATIONS", "CollectiveBackend"]

OPERATIONS = ("open", OPEN_DEVICE, "barrier", "dispatch", "combine")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Arrived:
    """The rows of one dispatch as they arrive, ordered by (source rank, token).

    `x` may have more rows than arrived, when it is the output itself and sized for the worst case.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_idx: torch.Tensor
    token_idx: torch.Tensor
    topk_weights: torch.Tensor | None


class CollectiveBackend:
    """Moves rows with point-to-point messages of the group's own backend.

    Args:
        transport: The group's transport; its operations are `OPERATIONS`.
        topology: The logical domains of the buffer.
        facts: What the buffer's checks know.
    """

    name = "collective"
    may_stay = False

    def __init__(self, transport: CollectiveTransport, topology: Topology, facts: BufferFacts) -> None:
        self._transport = transport
        self._topology = topology
        self._facts = facts
        self._num_dispatches = 0

    def plan_type(self, x: torch.Tensor, topk_weights: torch.Tensor | None, num_experts: int) -> type[RoutingPlan]:
        """One plan for every dispatch."""
        return RoutingPlan

    def empty_like_recv(self, handle: EPHandle, hidden: int, dtype: torch.dtype) -> None:
        """None: rows are copied out of any memory alike."""

    def barrier(self, *, use_comm_stream: bool, with_cpu_sync: bool) -> None:
        """Return when every rank has called it."""
        if torch.cuda.is_available() and (with_cpu_sync or torch.cuda.is_initialized()):
            # A barrier of the hosts promises what one of the streams does: work before it is done on every rank.
            torch.cuda.synchronize()
        self._transport.begin("barrier", [])

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation."""
        self._transport.report_rejection(operation, reason)

    def close(self) -> None:
        """Nothing is held: the group belongs to the caller."""

    # Dispatch

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""
        if args.handle is None:
            check_topk_values(self._facts, args.topk_idx, args.num_experts)
            operation, plan = self._open_new_routing(args)
        else:
            plan = _plan_of(args.handle)
            operation = self._transport.begin("dispatch", agreed_by_dispatch(args))
        num_ranks = self._topology.num_ranks
        is_exact = args.do_cpu_sync if args.handle is None else args.handle.was_cpu_synced
        num_rows = plan.num_recv if is_exact else max_recv_tokens(num_ranks, args.num_max_tokens_per_rank)
        arrived = _exchange_tokens(operation, args, plan, num_rows=plan.num_recv if args.do_expand else num_rows)
        scope.wait_before_epilogue()
        local_idx = local_expert_idx(
            arrived.topk_idx, rank=self._topology.rank, num_local_experts=args.num_experts // num_ranks
        )
        handle = args.handle if args.handle is not None else self._make_handle(args, plan, arrived, local_idx, num_rows)
        if args.do_expand:
            return _lay_out_by_expert(args, handle, arrived, _canonical_metadata(handle)[:, 2:])
        return DispatchResult(
            recv_x=arrived.x,
            recv_sf=None if arrived.sf is None else _place_sf(args, arrived.sf, num_rows),
            recv_topk_idx=_padded(local_idx.to(args.topk_idx.dtype), num_rows),
            recv_topk_weights=None if arrived.topk_weights is None else _padded(arrived.topk_weights, num_rows),
            handle=handle,
        )

    def _open_new_routing(self, args: DispatchArgs) -> tuple[Operation, RoutingPlan]:
        num_ranks = self._topology.num_ranks
        routing = route_tokens(args.topk_idx, num_ranks=num_ranks, num_local_experts=args.num_experts // num_ranks)
        num_send_rows: list[int] = routing.num_send_rows.tolist()
        operation = self._transport.begin("dispatch", agreed_by_dispatch(args), [[num] for num in num_send_rows])
        return operation, RoutingPlan(
            send_token_idx=routing.send_token_idx,
            num_send_rows=tuple(num_send_rows),
            num_recv_rows=tuple(values[0] for values in operation.peer_values),
            sent_row_idx=routing.sent_row_idx,
            slot_idx=routing.slot_idx,
            is_master=routing.is_master,
        )

    def _make_handle(
        self, args: DispatchArgs, plan: RoutingPlan, arrived: _Arrived, local_idx: torch.Tensor, num_rows: int
    ) -> EPHandle:
        topology, device, num_topk = self._topology, args.x.device, args.num_topk
        num_local_experts = args.num_experts // topology.num_ranks
        layout = layout_experts(local_idx, num_local_experts=num_local_experts, expert_alignment=args.expert_alignment)
        num_expanded = int(layout.num_aligned_rows.sum())
        if not args.do_cpu_sync:
            num_expanded = max_expanded_tokens(
                topology.num_ranks,
                args.num_max_tokens_per_rank,
                num_topk,
                num_local_experts,
                args.expert_alignment,
            )
        if args.recv_stats is not None:
            args.recv_stats.add_(layout.num_rows)
        num_recv_rows = torch.tensor(plan.num_recv_rows, device=device)
        src_rank = torch.repeat_interleave(num_recv_rows)
        position = torch.arange(num_topk, device=device)
        last_local = torch.where(local_idx >= 0, position, -1).amax(1)
        metadata = torch.empty(num_rows, num_topk + 2, dtype=torch.int32, device=device)
        metadata[: plan.num_recv, 0] = src_rank * args.num_max_tokens_per_rank + arrived.token_idx
        metadata[: plan.num_recv, 1] = src_rank * num_topk + last_local
        metadata[: plan.num_recv, 2:] = layout.row_idx if args.do_expand else -1
        per_peer = num_recv_rows.view(topology.num_scaleout_ranks, topology.num_scaleup_ranks).sum(0)
        expert_ends = layout.start_idx + layout.num_rows if args.do_expand else layout.num_aligned_rows.cumsum(0)
        first_slot = topology.rank * args.num_max_tokens_per_rank
        self._num_dispatches += 1
        return EPHandle(
            do_expand=args.do_expand,
            num_experts=args.num_experts,
            expert_alignment=args.expert_alignment,
            num_max_tokens_per_rank=args.num_max_tokens_per_rank,
            num_sms=args.num_sms,
            topk_idx=args.topk_idx.clone() if args.do_handle_copy else args.topk_idx,
            num_recv_tokens=num_rows,
            num_expanded_tokens=num_expanded,
            num_recv_tokens_per_expert_list=layout.num_aligned_rows.tolist() if args.do_cpu_sync else [],
            psum_num_recv_tokens_per_scaleup_rank=per_peer.cumsum(0).to(torch.int32),
            psum_num_recv_tokens_per_expert=expert_ends.to(torch.int32),
            num_unaligned_recv_tokens_per_expert=layout.num_rows.to(torch.int32),
            recv_src_metadata=metadata,
            dst_buffer_slot_idx=torch.where(plan.is_master, plan.slot_idx + first_slot, -1).to(torch.int32),
            plan=plan,
            buffer_id=self._facts.buffer_id,
            dispatch_idx=self._num_dispatches,
        )

    # Combine

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""
        handle, plan = args.handle, _plan_of(args.handle)
        operation = self._transport.begin("combine", agreed_by_combine(args))
        dst_rank = torch.where(
            handle.topk_idx >= 0, handle.topk_idx.long() // (handle.num_experts // self._topology.num_ranks), -1
        )
        returned_weights = None
        if handle.do_expand and not self._facts.allow_multiple_reduction:
            rows, row_idx = self._return_every_row(operation, args, dst_rank)
        else:
            local_rows, local_weights = _one_row_per_token(args)
            parts = [Rows(local_rows)] if local_weights is None else [Rows(local_rows), Rows(local_weights)]
            rows, *weights = operation.exchange(parts, plan.num_recv_rows, plan.num_send_rows, "rows back")
            row_idx = torch.where(plan.is_master, plan.sent_row_idx, -1)
            returned_weights = weights[0] if weights else None
        scope.wait_before_epilogue()
        is_hierarchical = self._facts.allow_multiple_reduction and self._topology.num_scaleout_ranks > 1
        combined_x = reduce_at_source(
            rows,
            row_idx,
            dst_rank,
            args.biases,
            ranks_per_node=self._topology.num_scaleup_ranks if is_hierarchical else None,
        )
        combined_weights = None
        if returned_weights is not None:
            # Each entry is taken from the row of the rank that hosts its expert.
            position = torch.arange(handle.num_topk, device=rows.device).expand_as(dst_rank)
            is_selected = dst_rank >= 0
            combined_weights = returned_weights.new_zeros(dst_rank.shape)
            combined_weights[is_selected] = returned_weights[plan.sent_row_idx[is_selected], position[is_selected]]
        return CombineResult(combined_x=combined_x, combined_topk_weights=combined_weights)

    def _return_every_row(
        self, operation: Operation, args: CombineArgs, dst_rank: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send each expert's row by itself, for a single rounding at the source."""
        plan = _plan_of(args.handle)
        row_of_entry = _canonical_metadata(args.handle)[:, 2:].long()
        num_entries = (row_of_entry >= 0).sum(1)
        num_back = [int(chunk.sum()) for chunk in num_entries.split(plan.num_recv_rows)]
        # Seen from the source, "rank" plays the part of "expert": its entries by rank, then by token and position.
        by_rank = layout_experts(dst_rank, num_local_experts=self._topology.num_ranks, expert_alignment=1)
        rows = operation.exchange_rows(
            args.x[row_of_entry[row_of_entry >= 0]], num_back, by_rank.num_rows.tolist(), "expert rows back"
        )
        return rows, by_rank.row_idx


def _exchange_tokens(operation: Operation, args: DispatchArgs, plan: RoutingPlan, *, num_rows: int) -> _Arrived:
    """Send this rank's tokens with all that belongs to them; `x` is received into `num_rows` rows."""
    token_idx = plan.send_token_idx
    ids = torch.cat([args.topk_idx.to(torch.int32)[token_idx], token_idx.to(torch.int32).unsqueeze(1)], dim=1)
    words = _as_words(args.x)
    parts = {"ids": Rows(ids), "x": Rows(words[token_idx], words.new_empty(num_rows, words.size(1)))}
    if args.sf is not None:
        parts["sf"] = Rows(args.sf[token_idx].contiguous())
    if args.topk_weights is not None:
        parts["weights"] = Rows(args.topk_weights[token_idx])
    received = operation.exchange(list(parts.values()), plan.num_send_rows, plan.num_recv_rows, "payload")
    arrived = dict(zip(parts, received, strict=True))
    return _Arrived(
        x=arrived["x"].view(args.x.dtype),
        sf=arrived.get("sf"),
        topk_idx=arrived["ids"][:, :-1],
        token_idx=arrived["ids"][:, -1],
        topk_weights=arrived.get("weights"),
    )


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """The rows as 8-byte words: torch cannot index every dtype that may come, and wide elements are copied faster."""
    num_words = rows.size(1) * rows.element_size() // 8
    if rows.numel() == 0:
        # An empty tensor may count as contiguous with strides and an offset that no view of another width accepts.
        return torch.empty(len(rows), num_words, dtype=torch.int64, device=rows.device)
    return rows.view(-1).view(torch.int64).view(len(rows), num_words)


def _padded(rows: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The rows at the head of a tensor of `num_rows`, the rest not initialised; the rows themselves if they fill it."""
    if len(rows) == num_rows:
        return rows.contiguous()
    out = rows.new_empty(num_rows, *rows.shape[1:])
    out[: len(rows)] = rows
    return out


def _place_sf(args: DispatchArgs, sf: torch.Tensor, num_rows: int, row_idx: torch.Tensor | None = None) -> torch.Tensor:
    """Put scale rows at `row_idx` (None: at the head) of an output in the layout that was asked for."""
    if args.use_tma_aligned_col_major_sf:
        out = new_tma_aligned_col_major(sf, num_rows)
    else:
        out = sf.new_empty(num_rows, sf.size(1))
    if row_idx is None:
        out[: len(sf)] = sf
    else:
        out[row_idx] = sf
    return out


def _lay_out_by_expert(
    args: DispatchArgs, handle: EPHandle, arrived: _Arrived, row_of_entry: torch.Tensor
) -> DispatchResult:
    """Copy each arrived row to the row of every local expert that wants it, and zero the gaps if asked."""
    num_rows = handle.num_expanded_tokens
    src_row, position = (row_of_entry >= 0).nonzero(as_tuple=True)
    dst_row = row_of_entry[src_row, position].long()
    words = _as_words(arrived.x)
    out_words = words.new_empty(num_rows, words.size(1))
    out_words[dst_row] = words[src_row]
    sf = None if arrived.sf is None else _place_sf(args, arrived.sf[src_row], num_rows, dst_row)
    weights = None
    if arrived.topk_weights is not None:
        weights = arrived.topk_weights.new_empty(num_rows)
        weights[dst_row] = arrived.topk_weights[src_row, position]
    if args.do_zero_padding:
        gaps = _padding_rows(handle, dst_row)
        out_words[gaps] = 0
        if sf is not None:
            sf[gaps] = 0
        if weights is not None:
            weights[gaps] = 0
    return DispatchResult(
        recv_x=out_words.view(args.x.dtype),
        recv_sf=sf,
        recv_topk_idx=None,
        recv_topk_weights=weights,
        handle=handle,
    )


def _padding_rows(handle: EPHandle, dst_row: torch.Tensor) -> torch.Tensor:
    """Rows between an expert's last real row and the next expert's first; not the tail past the last expert."""
    num_aligned = align_up_tensor(handle.num_unaligned_recv_tokens_per_expert.long(), handle.expert_alignment)
    is_gap = torch.ones(int(num_aligned.sum()), dtype=torch.bool, device=dst_row.device)
    is_gap[dst_row] = False
    return is_gap.nonzero()[:, 0]


def _received_order(handle: EPHandle) -> torch.Tensor | None:
    """The order that brings permuted rows back to (source rank, token); None where they never left it."""
    source = handle.recv_src_metadata[: _plan_of(handle).num_recv, 0]
    return None if bool((source[1:] > source[:-1]).all()) else source.argsort()


def _canonical_metadata(handle: EPHandle) -> torch.Tensor:
    """The real rows of the metadata, ordered by (source rank, token)."""
    metadata = handle.recv_src_metadata[: _plan_of(handle).num_recv]
    order = _received_order(handle)
    return metadata if order is None else metadata[order]


def _one_row_per_token(args: CombineArgs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What goes back for each received token, ordered by (source rank, token): its row, and its weights."""
    handle = args.handle
    if not handle.do_expand:
        order = _received_order(handle)
        if order is None:
            head = slice(_plan_of(handle).num_recv)
            return args.x[head], None if args.topk_weights is None else args.topk_weights[head]
        return args.x[order], None if args.topk_weights is None else args.topk_weights[order]
    row_of_entry = _canonical_metadata(handle)[:, 2:].long()
    rows = sum_rows_in_order(args.x, row_of_entry)
    if args.topk_weights is None:
        return rows, None
    is_local = row_of_entry >= 0
    weights = args.topk_weights.new_zeros(row_of_entry.shape)
    weights[is_local] = args.topk_weights[row_of_entry[is_local]]
    return rows, weights


def _plan_of(handle: EPHandle) -> RoutingPlan:
    plan = handle.plan
    assert isinstance(plan, RoutingPlan), "handles of other backends do not come here"
    return plan
