"""Owns dispatch across nodes: memory for the results, the kernels' parameters and their order, and the handle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deep_ep_core.align import ceil_div
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.jit.structs import ParamsStruct
from deep_ep_core.stream import CommScope
from deep_ep_ep.agreed import HANDLE_NAME, agreed_by_dispatch
from deep_ep_ep.backend import DispatchResult
from deep_ep_ep.checks import BufferFacts, DispatchArgs
from deep_ep_ep.device.dispatch_kernel import row_stages, side_bytes
from deep_ep_ep.device.network.context import NetworkContext
from deep_ep_ep.device.network.dispatch_kernels import (
    NUM_RELAY_COUNTS,
    PLAN_TILE_TOKENS,
    NetworkDispatchParams,
    chunk_rows,
    count_spec,
    find_spec,
    forward_table_words,
    move_launch_shape,
    place_spec,
    plan_launch_shape,
    receive_launch_shape,
    receive_spec,
    record_bytes,
    send_spec,
    sum_launch_shape,
    sum_spec,
    write_spec,
)
from deep_ep_ep.device.network.plan import NetworkPlan
from deep_ep_ep.device.opening import BY_EXPERT, AgreedValues, OperationKind
from deep_ep_ep.device.plan import version_of
from deep_ep_ep.handle import EPHandle
from deep_ep_ep.quant import new_tma_aligned_col_major
from deep_ep_ep.sizing import max_expanded_tokens, max_recv_tokens

__all__ = ["NetworkDispatcher"]

# The tensors of a plan that repeating the dispatch needs.
_PLAN_TENSORS = (
    "row_of_entry",
    "expert_row_of_entry",
    "slot_of_entry",
    "sent_tokens",
    "num_send_rows",
    "recv_row_ends",
    "relay_counts",
)
# Stamps of counts go from 1 to this, and round.
_MAX_STAMP = 2**31 - 2
# A handle's number is one of these behind one of those, in 31 bits.
_NUM_FAILURES, _NUM_DISPATCHES = 2**11, 2**20


@dataclass(slots=True, eq=False)
class _Sizes:
    """Rows of the results."""

    num_recv: int
    num_expanded: int
    expert_counts: list[int]


class _DispatchCall:
    """What dispatches of one kind share. They come one at a time, and write the rest of the parameters.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
        args: The first of them.

    Attributes:
        device, num_topk: Of the arguments.
        gin: Parameters of the kernels with GIN; `params` is its part that all kernels have.
        params: See above.
        local: The part of `params` that is as in one node.
        exchange: Parameters of the exchange.
        agreed: The agreed values of its opening.
        num_columns: Ranks, experts and relays, which the plan counts.
        num_local_experts: Experts of this rank.
        num_slots: The most rows that may come to any rank.
        max_expanded: The most rows by expert.
        side_bytes: Bytes of a token's side record.
        table_rows: Records of the forward table.
    """

    def __init__(self, context: NetworkContext, facts: BufferFacts, args: DispatchArgs) -> None:
        self.device, self.num_topk = context.device, args.num_topk
        num_ranks, num_topk, max_tokens = context.num_ranks, args.num_topk, args.num_max_tokens_per_rank
        self._context = context
        self._num_sms = min(args.num_sms, context.max_num_sms)
        self._is_idx64 = args.topk_idx.dtype == torch.int64
        self.num_local_experts = args.num_experts // num_ranks
        self.num_columns = num_ranks + args.num_experts + context.num_relays
        self.num_slots = max_recv_tokens(num_ranks, max_tokens)
        self.max_expanded = max_expanded_tokens(
            num_ranks, max_tokens, num_topk, self.num_local_experts, args.expert_alignment
        )
        self.table_rows = context.num_relays * max_tokens
        row_bytes = args.x.size(1) * args.x.element_size()
        num_sf_packs = 0 if args.sf is None else args.sf.size(1)
        self.side_bytes = side_bytes(
            num_topk=num_topk,
            num_sf_packs=num_sf_packs,
            has_weights=args.topk_weights is not None,
            do_expand=args.do_expand,
        )
        record = record_bytes(row_bytes=row_bytes, side_bytes=self.side_bytes, num_topk=num_topk)
        self.gin = context.new_gin_call(NetworkDispatchParams, "deep_ep_ep::NetworkDispatchCall")
        self.params: NetworkDispatchParams = self.gin.call
        self.params.net = net = context.network(num_qps=context.num_qps_of(args))
        # Of own tokens only those for other nodes are packed, each once a relay.
        num_packed = max_tokens * min(num_topk, context.num_relays - 1)
        self.params.recv_offset, self.params.send_offset = context.divide_slabs(
            "the rows of a dispatch", [self.table_rows * record, num_packed * record]
        )
        self.params.record_bytes, self.params.chunk_rows = record, chunk_rows(record)
        self.params.is_single_rounding = args.do_expand and not facts.allow_multiple_reduction
        self.local = local = self.params.local
        local.team, local.wait, local.state = net.team, net.wait, net.state
        local.num_ranks = num_ranks
        local.num_topk, local.num_experts = num_topk, args.num_experts
        local.num_max_tokens, local.expert_alignment = max_tokens, args.expert_alignment
        local.row_bytes, local.side_bytes, local.num_sf_packs = row_bytes, self.side_bytes, num_sf_packs
        local.do_expand, local.do_zero_padding = args.do_expand, args.do_zero_padding
        self._stages = row_stages(row_bytes, plan_columns=0)
        local.num_stages, local.piece_bytes = self._stages.num_stages, self._stages.piece_bytes
        local.stages_offset = self._stages.offset
        self.exchange = context.new_exchange(num_qps=context.num_qps_of(args))
        self.agreed = AgreedValues(self.exchange.call.opening, agreed_by_dispatch(args), handle_name=HANDLE_NAME)

    def tell(self, x_offset: int, side_word: int) -> None:
        """What the opening tells: where rows and side records go in this rank's window."""
        for opening in (self.exchange.call.opening, self.local.opening):
            opening.told[0], opening.told[1] = x_offset, side_word

    def count(self, stream: int) -> None:
        """Count this rank's tokens, into its slot."""
        is_idx64, columns = self._is_idx64, self.num_columns
        shape = plan_launch_shape(self._num_sms, num_columns=columns)
        self._run(("count", is_idx64, shape), lambda: (count_spec(is_idx64=is_idx64), shape), self.params, stream)
        self._run(("sum", columns), lambda: (sum_spec(), sum_launch_shape(columns)), self.params, stream)

    def open(self, stream: int, *, has_counts: bool) -> None:
        """Exchange openings, and counts."""
        self.exchange.call.num_counts = self.num_columns if has_counts else 0
        self._context.exchange(self.exchange, stream)

    def write_plan(self, stream: int) -> None:
        """From the counts of all ranks, the plan."""
        is_idx64, num_sms = self._is_idx64, self._num_sms
        self._run(("find", num_sms), lambda: (find_spec(), plan_launch_shape(num_sms)), self.params, stream)
        shape = plan_launch_shape(num_sms, num_columns=self.num_columns)
        self._run(("write", is_idx64, shape), lambda: (write_spec(is_idx64=is_idx64), shape), self.params, stream)

    def move(self, stream: int) -> None:
        """Send rows to relays, and hand on those that come."""
        dev_comm_bytes, is_idx64, shape = self._context.dev_comm_bytes, self._is_idx64, move_launch_shape(self._num_sms)
        self._run(
            ("send", is_idx64, shape), lambda: (send_spec(dev_comm_bytes, is_idx64=is_idx64), shape), self.gin, stream
        )
        self._run(("place", shape), lambda: (place_spec(dev_comm_bytes), shape), self.gin, stream)

    def receive(self, stream: int) -> None:
        """Wait for the rows of this rank, and write the results."""
        is_idx64, shape = self._is_idx64, receive_launch_shape(self._num_sms, self._stages)
        self._run(("receive", is_idx64, shape), lambda: (receive_spec(is_idx64=is_idx64), shape), self.params, stream)

    def _run(
        self, key: object, make: Callable[[], tuple[KernelSpec, LaunchShape]], params: ParamsStruct, stream: int
    ) -> None:
        self._context.launch(key, make)(params, stream)


class NetworkDispatcher:
    """Dispatches through a context. Calls are made under a `CommScope`, one at a time.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
    """

    def __init__(self, context: NetworkContext, facts: BufferFacts) -> None:
        self._context = context
        self._facts = facts
        self._num_dispatches = 0
        self._num_failures = 0
        self._host_stamp = 0

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""
        call = args.kind.prepared
        if call is None:
            call = args.kind.prepared = _DispatchCall(self._context, self._facts, args)
        assert isinstance(call, _DispatchCall), "a kind is of one operation"
        self._set_arguments(call, args)
        stream = scope.stream_handle
        if args.handle is not None:
            return self._repeat(call, args, args.handle, scope)
        self._count_dispatch()
        made = self._new_plan(call, args)
        # Of no use once the plan is made.
        num_tiles = ceil_div(args.x.size(0), PLAN_TILE_TOKENS)
        scratch = _ints(call, num_tiles + 1, call.num_columns)
        call.params.tile_counts = scratch.data_ptr()
        call.params.first_rows = scratch[num_tiles].data_ptr()
        sizes = _Sizes(call.num_slots, call.max_expanded, [])
        if args.do_cpu_sync:
            self._begin(call, OperationKind.PLAN)
            call.tell(0, 0)
            self._ask_host(call)
            self._plan(call, stream)
            sizes = self._read_sizes(call)
            self._begin(call, OperationKind.PLACE)
        else:
            self._begin(call, OperationKind.DISPATCH)
        with self._context.refusing(stream):
            made["recv_src_metadata"] = metadata = _ints(call, sizes.num_recv, call.num_topk + 2)
            call.local.metadata = metadata.data_ptr()
            result = self._new_results(call, args, sizes, self._make_handle(call, args, made, sizes))
        if args.do_cpu_sync:
            call.open(stream, has_counts=False)
        else:
            self._plan(call, stream)
        self._move(call, scope)
        return result

    def _repeat(self, call: _DispatchCall, args: DispatchArgs, handle: EPHandle, scope: CommScope) -> DispatchResult:
        """A dispatch by the plan of an earlier one."""
        plan = handle.plan
        assert isinstance(plan, NetworkPlan), "handles of other backends do not come here"
        self._begin(call, OperationKind.PLACE, handle.dispatch_idx)
        _set_plan(call, {field: getattr(plan, field) for field in _PLAN_TENSORS})
        call.local.expert_ends = handle.psum_num_recv_tokens_per_expert.data_ptr()
        call.local.num_expert_rows = handle.num_unaligned_recv_tokens_per_expert.data_ptr()
        # What the first dispatch wrote stays.
        call.local.metadata = call.params.forward_table = None
        sizes = _Sizes(handle.num_recv_tokens, handle.num_expanded_tokens, handle.num_recv_tokens_per_expert_list)
        with self._context.refusing(scope.stream_handle):
            result = self._new_results(call, args, sizes, handle)
        call.open(scope.stream_handle, has_counts=False)
        self._move(call, scope)
        return result

    def _count_dispatch(self) -> None:
        """Give the next handle its number, which ranks compare.

        Counted where a dispatch begins, whatever becomes of it, and from 0 after each failure: of those that were under
        way then, ranks may have enqueued some more than others.
        """
        if self._num_failures != self._context.num_failures:
            self._num_failures, self._num_dispatches = self._context.num_failures, 0
        self._num_dispatches += 1

    def _begin(self, call: _DispatchCall, kind: OperationKind, dispatch_idx: int = 0) -> None:
        self._context.begin(call.agreed.begin(kind, dispatch_idx))

    def _set_arguments(self, call: _DispatchCall, args: DispatchArgs) -> None:
        local, num_tokens = call.local, args.x.size(0)
        local.num_tokens = num_tokens
        local.x, local.topk_idx = args.x.data_ptr(), args.topk_idx.data_ptr()
        local.host_counts = None
        if args.sf is not None:
            local.sf = args.sf.data_ptr()
            local.sf_token_stride, local.sf_pack_stride = args.sf.stride()
        if args.topk_weights is not None:
            # A tensor without elements has no address, and null means that there is none.
            local.topk_weights = args.topk_weights.data_ptr() if num_tokens else self._context.state_address
        if args.recv_stats is not None:
            local.recv_stats = args.recv_stats.data_ptr()

    # The plan

    def _new_plan(self, call: _DispatchCall, args: DispatchArgs) -> dict[str, torch.Tensor]:
        """Memory for the plan and the handle, which the kernels are told of; but for the metadata."""
        num_tokens, num_topk, num_ranks = args.x.size(0), call.num_topk, self._context.num_ranks
        num_scaleup = num_ranks // self._context.num_nodes if self._context.options.is_hybrid else num_ranks
        made = {
            "row_of_entry": _ints(call, num_tokens, num_topk),
            "expert_row_of_entry": _ints(call, num_tokens if args.do_expand else 0, num_topk),
            "slot_of_entry": _ints(call, num_tokens, num_topk),
            "sent_tokens": _ints(call, num_tokens, num_topk),
            "num_send_rows": _ints(call, num_ranks),
            "recv_row_ends": _ints(call, num_ranks),
            "relay_counts": _ints(call, NUM_RELAY_COUNTS, num_ranks),
            "forward_table": _ints(call, call.table_rows, forward_table_words(num_topk)),
            "psum_num_recv_tokens_per_scaleup_rank": _ints(call, num_scaleup),
            "psum_num_recv_tokens_per_expert": _ints(call, call.num_local_experts),
            "num_unaligned_recv_tokens_per_expert": _ints(call, call.num_local_experts),
            "dst_buffer_slot_idx": _ints(call, num_tokens, num_topk),
            "topk_idx": torch.empty_like(args.topk_idx) if args.do_handle_copy else args.topk_idx,
        }
        _set_plan(call, made)
        call.params.forward_table = made["forward_table"].data_ptr()
        call.params.scaleup_row_ends = made["psum_num_recv_tokens_per_scaleup_rank"].data_ptr()
        call.local.expert_ends = made["psum_num_recv_tokens_per_expert"].data_ptr()
        call.local.num_expert_rows = made["num_unaligned_recv_tokens_per_expert"].data_ptr()
        call.local.dst_slot = made["dst_buffer_slot_idx"].data_ptr()
        call.local.topk_idx_copy = made["topk_idx"].data_ptr() if args.do_handle_copy else None
        return made

    def _plan(self, call: _DispatchCall, stream: int) -> None:
        call.count(stream)
        call.open(stream, has_counts=True)
        call.write_plan(stream)

    def _ask_host(self, call: _DispatchCall) -> None:
        self._host_stamp = call.local.host_stamp = self._host_stamp % _MAX_STAMP + 1
        call.local.host_counts = self._context.host_counts_address

    def _read_sizes(self, call: _DispatchCall) -> _Sizes:
        """Wait on the host for the counts."""
        context = self._context
        context.wait_for_counts(self._host_stamp)
        num_recv, *expert_counts = context.read_counts(1 + call.num_local_experts)
        return _Sizes(num_recv, sum(expert_counts), expert_counts)

    # The rows

    def _new_results(self, call: _DispatchCall, args: DispatchArgs, sizes: _Sizes, handle: EPHandle) -> DispatchResult:
        """Memory for the results, which the kernels are told of, and the other ranks by the opening."""
        context, local, num_topk, device = self._context, call.local, call.num_topk, self._context.device
        num_rows = sizes.num_expanded if args.do_expand else sizes.num_recv
        shape, heap = (num_rows, args.x.size(1)), context.memory.heap
        recv_x = None
        if context.recv_memory == "window":
            recv_x = heap.empty(shape, args.x.dtype)
        elif context.recv_memory == "auto":
            recv_x = heap.try_empty(shape, args.x.dtype)
        x_offset = None if recv_x is None else context.memory.offset_of(recv_x)
        local.is_staged = x_offset is None
        stage_rows = sizes.num_recv if x_offset is None else 0
        side_offset, staged_offset = context.divide_stage(
            "the rows of a dispatch", [sizes.num_recv * call.side_bytes, stage_rows * local.row_bytes]
        )
        by_expert = BY_EXPERT if args.do_expand and x_offset is not None else 0
        call.tell(staged_offset if x_offset is None else x_offset, side_offset | by_expert)
        if recv_x is None:
            recv_x = torch.empty(shape, dtype=args.x.dtype, device=device)
        local.recv_x = recv_x.data_ptr()
        recv_topk_idx = recv_weights = recv_sf = None
        if not args.do_expand:
            recv_topk_idx = torch.empty((num_rows, num_topk), dtype=args.topk_idx.dtype, device=device)
            local.recv_topk_idx = recv_topk_idx.data_ptr()
        if args.topk_weights is not None:
            weights_shape = (num_rows,) if args.do_expand else (num_rows, num_topk)
            recv_weights = torch.empty(weights_shape, dtype=torch.float32, device=device)
            local.recv_topk_weights = recv_weights.data_ptr()
        if args.sf is not None:
            if args.use_tma_aligned_col_major_sf:
                recv_sf = new_tma_aligned_col_major(args.sf, num_rows)
            else:
                recv_sf = args.sf.new_empty(num_rows, args.sf.size(1))
            local.recv_sf = recv_sf.data_ptr()
            local.recv_sf_row_stride, local.recv_sf_pack_stride = recv_sf.stride()
        return DispatchResult(
            recv_x=recv_x,
            recv_sf=recv_sf,
            recv_topk_idx=recv_topk_idx,
            recv_topk_weights=recv_weights,
            handle=handle,
        )

    def _move(self, call: _DispatchCall, scope: CommScope) -> None:
        call.move(scope.stream_handle)
        scope.wait_before_epilogue()
        call.receive(scope.stream_handle)

    def _make_handle(
        self, call: _DispatchCall, args: DispatchArgs, made: dict[str, torch.Tensor], sizes: _Sizes
    ) -> EPHandle:
        metadata = made["recv_src_metadata"]
        plan = NetworkPlan(
            **{name: made[name] for name in _PLAN_TENSORS},
            forward_table=made["forward_table"],
            metadata=metadata,
            metadata_version=version_of(metadata),
        )
        return EPHandle(
            do_expand=args.do_expand,
            num_experts=args.num_experts,
            expert_alignment=args.expert_alignment,
            num_max_tokens_per_rank=args.num_max_tokens_per_rank,
            num_sms=args.num_sms,
            topk_idx=made["topk_idx"],
            num_recv_tokens=sizes.num_recv,
            num_expanded_tokens=sizes.num_expanded,
            num_recv_tokens_per_expert_list=sizes.expert_counts,
            psum_num_recv_tokens_per_scaleup_rank=made["psum_num_recv_tokens_per_scaleup_rank"],
            psum_num_recv_tokens_per_expert=made["psum_num_recv_tokens_per_expert"],
            num_unaligned_recv_tokens_per_expert=made["num_unaligned_recv_tokens_per_expert"],
            recv_src_metadata=metadata,
            dst_buffer_slot_idx=made["dst_buffer_slot_idx"],
            plan=plan,
            buffer_id=self._facts.buffer_id,
            dispatch_idx=self._num_failures % _NUM_FAILURES * _NUM_DISPATCHES + self._num_dispatches % _NUM_DISPATCHES,
        )


def _ints(call: _DispatchCall, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=call.device)


def _set_plan(call: _DispatchCall, tensors: dict[str, torch.Tensor]) -> None:
    """Tell the kernels of a plan."""
    local, params = call.local, call.params
    local.row_of_entry = tensors["row_of_entry"].data_ptr()
    local.expert_row_of_entry = tensors["expert_row_of_entry"].data_ptr()
    local.num_send_rows = tensors["num_send_rows"].data_ptr()
    local.recv_row_ends = tensors["recv_row_ends"].data_ptr()
    params.slot_of_entry = tensors["slot_of_entry"].data_ptr()
    params.sent_tokens = tensors["sent_tokens"].data_ptr()
    params.relay_counts = tensors["relay_counts"].data_ptr()
