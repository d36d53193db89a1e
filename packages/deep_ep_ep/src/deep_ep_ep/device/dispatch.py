"""Owns dispatch on the device backend: memory for the results, the kernel's parameters, and the handle.

What calls of one kind share is made ready at the first of them, see `dispatch_call`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.align import align_up
from deep_ep_core.heap import Reservation
from deep_ep_core.stream import CommScope
from deep_ep_ep.backend import DispatchResult
from deep_ep_ep.checks import BufferFacts, DispatchArgs
from deep_ep_ep.device.context import DeviceContext
from deep_ep_ep.device.dispatch_call import ALL_PARTS, PLACE, PLAN, PLAN_AND_PLACE, RECEIVE, DispatchCall, KernelParts
from deep_ep_ep.device.opening import BY_EXPERT, OperationKind
from deep_ep_ep.device.plan import DevicePlan, RoutingMemory, routing_layout, version_of
from deep_ep_ep.handle import EPHandle
from deep_ep_ep.quant import new_tma_aligned_col_major

__all__ = ["Dispatcher"]

# Tokens that a block counts at a time, `kTileTokens`: up to so many, blocks need no memory to add up their counts.
_TILE_TOKENS = 512
_ALIGNMENT = 256
# Stamps of counts go from 1 to this, and round.
_MAX_STAMP = 2**31 - 2


@dataclass(slots=True, eq=False)
class _Sizes:
    """Rows of the results."""

    num_recv: int
    num_expanded: int
    expert_counts: list[int]


class Dispatcher:
    """Dispatches through a context. Calls are made under a `CommScope`, one at a time.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
    """

    def __init__(self, context: DeviceContext, facts: BufferFacts) -> None:
        self._context = context
        self._facts = facts
        self._num_dispatches = 0
        self._host_stamp = 0

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""
        call = args.kind.prepared
        if call is None:
            call = args.kind.prepared = DispatchCall(self._context, args)
        assert isinstance(call, DispatchCall), "a kind is of one operation"
        self._set_arguments(call, args)
        handle = args.handle
        if handle is not None:
            self._begin(call, OperationKind.PLACE, handle.dispatch_idx)
            self._set_plan(call, handle)
            sizes = _Sizes(handle.num_recv_tokens, handle.num_expanded_tokens, handle.num_recv_tokens_per_expert_list)
            return self._place(call, args, None, sizes, scope, PLACE)
        # Counted where it begins, whatever becomes of it: ranks compare the numbers of handles, and if ranks disagree
        # some find out at once and some when they have made one.
        self._num_dispatches += 1
        if not args.do_cpu_sync:
            memory = self._new_routing(call, args, num_metadata_rows=call.num_slots)
            self._begin(call, OperationKind.DISPATCH)
            return self._place(call, args, memory, _Sizes(call.num_slots, call.max_expanded, []), scope, ALL_PARTS)
        # Memory for the worst case would live as long as the handle, so metadata of known size have their own.
        memory = self._new_routing(call, args, num_metadata_rows=0)
        if not args.do_expand:
            self._begin(call, OperationKind.DISPATCH)
            return self._place_then_read(call, args, memory, scope)
        # The worst case by expert is far larger than what comes, so rows do not move before the host knows how many.
        self._begin(call, OperationKind.PLAN)
        call.told[0] = call.told[1] = 0
        self._launch(call, PLAN, scope, asks_host=True)
        sizes = self._read_counts(call)
        self._begin(call, OperationKind.PLACE)
        return self._place(call, args, memory, sizes, scope, PLACE)

    def _begin(self, call: DispatchCall, kind: OperationKind, dispatch_idx: int = 0) -> None:
        self._context.begin(call.agreed.begin(kind, dispatch_idx))

    def _set_arguments(self, call: DispatchCall, args: DispatchArgs) -> None:
        params, num_tokens = call.params, args.x.shape[0]
        params.num_tokens = num_tokens
        params.x, params.topk_idx = args.x.data_ptr(), args.topk_idx.data_ptr()
        if args.sf is not None:
            params.sf = args.sf.data_ptr()
            params.sf_token_stride, params.sf_pack_stride = args.sf.stride()
        if args.topk_weights is not None:
            # A tensor without elements has no address, and null means that there is none.
            params.topk_weights = args.topk_weights.data_ptr() if num_tokens else self._context.state_address
        if args.recv_stats is not None:
            params.recv_stats = args.recv_stats.data_ptr()

    # The plan

    def _new_routing(self, call: DispatchCall, args: DispatchArgs, *, num_metadata_rows: int) -> RoutingMemory:
        """Memory for the plan and the handle, which the kernel is told of."""
        params, num_tokens = call.params, args.x.shape[0]
        layout = routing_layout(
            self._context.num_ranks,
            call.num_local_experts,
            num_tokens,
            call.num_topk,
            num_metadata_rows,
            args.num_sms * call.num_columns if num_tokens > _TILE_TOKENS else 0,
            call.idx_dtype if args.do_handle_copy else None,
            args.do_expand,
        )
        memory = RoutingMemory(layout, call.new_ints(layout.num_words))
        address, offsets = memory.address, layout.offsets
        params.block_counts = address + offsets["scratch"]
        params.row_of_entry = address + offsets["row_of_entry"]
        params.expert_row_of_entry = address + offsets["expert_row_of_entry"]
        params.num_send_rows = address + offsets["num_send_rows"]
        params.recv_row_ends = address + offsets["psum_num_recv_tokens_per_scaleup_rank"]
        params.expert_ends = address + offsets["psum_num_recv_tokens_per_expert"]
        params.num_expert_rows = address + offsets["num_unaligned_recv_tokens_per_expert"]
        params.dst_slot = address + offsets["dst_buffer_slot_idx"]
        if args.do_handle_copy:
            params.topk_idx_copy = address + offsets["topk_idx"]
        else:
            memory.separate["topk_idx"] = args.topk_idx
        return memory

    def _set_plan(self, call: DispatchCall, handle: EPHandle) -> None:
        params, plan = call.params, handle.plan
        assert isinstance(plan, DevicePlan), "handles of other backends do not come here"
        params.row_of_entry = plan.ints.address_of("row_of_entry")
        params.expert_row_of_entry = plan.ints.address_of("expert_row_of_entry")
        params.num_send_rows = plan.ints.address_of("num_send_rows")
        params.recv_row_ends = handle.address_of("psum_num_recv_tokens_per_scaleup_rank")
        params.expert_ends = handle.address_of("psum_num_recv_tokens_per_expert")
        params.num_expert_rows = handle.address_of("num_unaligned_recv_tokens_per_expert")

    def _read_counts(self, call: DispatchCall) -> _Sizes:
        """Wait on the host until the kernel that was launched last has told the counts; it may still move rows."""
        context = self._context
        context.wait_for_counts(self._host_stamp)
        num_recv, *expert_counts = context.read_counts(1 + call.num_local_experts)
        return _Sizes(num_recv, sum(expert_counts), expert_counts)

    # The rows

    def _place(
        self,
        call: DispatchCall,
        args: DispatchArgs,
        routing: RoutingMemory | None,
        sizes: _Sizes,
        scope: CommScope,
        parts: KernelParts,
    ) -> DispatchResult:
        """Move rows into results whose sizes are known."""
        num_rows = sizes.num_expanded if args.do_expand else sizes.num_recv
        memory = self._context.memory
        recv_x = None if call.stages_all else memory.heap.try_empty((num_rows, call.hidden), call.dtype)
        x_offset = None if recv_x is None else memory.offset_of(recv_x)
        kept = self._tell(call, x_offset, num_sides=sizes.num_recv)
        if recv_x is None:
            recv_x = call.new_x(num_rows, call.hidden)
        result = self._new_results(call, args, routing, sizes, recv_x)
        # One kernel does the epilogue too, so all of it comes behind that event.
        scope.wait_before_epilogue()
        self._launch(call, parts, scope)
        del kept
        return result

    def _place_then_read(
        self, call: DispatchCall, args: DispatchArgs, routing: RoutingMemory, scope: CommScope
    ) -> DispatchResult:
        """Move rows to where the most that may come have room, and make results when the counts are there."""
        memory = self._context.memory
        region = None if call.stages_all else memory.heap.try_reserve(call.num_slots * call.row_bytes)
        x_offset = None if region is None else memory.layout.num_bytes + region.offset
        kept = self._tell(call, x_offset, num_sides=call.num_slots)
        self._launch(call, PLAN_AND_PLACE, scope, asks_host=True)
        sizes = self._read_counts(call)
        if region is None:
            recv_x = call.new_x(sizes.num_recv, call.hidden)
        else:
            recv_x = region.take((sizes.num_recv, call.hidden), call.dtype)
        result = self._new_results(call, args, routing, sizes, recv_x)
        scope.wait_before_epilogue()
        self._launch(call, RECEIVE, scope)
        del kept
        return result

    def _tell(self, call: DispatchCall, x_offset: int | None, *, num_sides: int) -> list[Reservation]:
        """Decide where peers put rows and side records; the results' own memory is at `x_offset`, if in the window.

        Args:
            call: What the call shares with others.
            x_offset: Offset of the results' rows in the window; None stages them.
            num_sides: The most rows that may come to this rank.

        Returns:
            What must live until the kernels that use it are launched.
        """
        memory, kept = self._context.memory, []
        is_staged = x_offset is None
        side_offset = self._context.stage_offset
        if side_offset is None:
            sizes = [num_sides * call.side_bytes] + ([num_sides * call.row_bytes] if is_staged else [])
            kept = [memory.heap.reserve(max(size, 1)) for size in sizes]
            side_offset = memory.layout.num_bytes + kept[0].offset
            if x_offset is None:
                x_offset = memory.layout.num_bytes + kept[1].offset
        elif x_offset is None:
            x_offset = side_offset + align_up(call.num_slots * call.side_bytes, _ALIGNMENT)
        call.params.is_staged = is_staged
        call.told[0] = x_offset
        call.told[1] = side_offset | BY_EXPERT if call.do_expand and not is_staged else side_offset
        return kept

    def _new_results(
        self,
        call: DispatchCall,
        args: DispatchArgs,
        routing: RoutingMemory | None,
        sizes: _Sizes,
        recv_x: torch.Tensor,
    ) -> DispatchResult:
        """Memory for the other results, which the kernel is told of."""
        params, num_topk = call.params, call.num_topk
        num_rows = sizes.num_expanded if call.do_expand else sizes.num_recv
        recv_topk_idx = recv_weights = recv_sf = None
        params.recv_x = recv_x.data_ptr()
        if not call.do_expand:
            recv_topk_idx = call.new_idx(num_rows, num_topk)
            params.recv_topk_idx = recv_topk_idx.data_ptr()
        if args.topk_weights is not None:
            recv_weights = call.new_weights(num_rows) if call.do_expand else call.new_weights(num_rows, num_topk)
            params.recv_topk_weights = recv_weights.data_ptr()
        if args.sf is not None:
            if args.use_tma_aligned_col_major_sf:
                recv_sf = new_tma_aligned_col_major(args.sf, num_rows)
            else:
                recv_sf = args.sf.new_empty(num_rows, call.num_sf_packs)
            params.recv_sf = recv_sf.data_ptr()
            params.recv_sf_row_stride, params.recv_sf_pack_stride = recv_sf.stride()
        handle = args.handle
        if handle is None:
            assert routing is not None, "a call without a handle has a new routing"
            handle = self._make_handle(call, args, routing, sizes)
        return DispatchResult(
            recv_x=recv_x,
            recv_sf=recv_sf,
            recv_topk_idx=recv_topk_idx,
            recv_topk_weights=recv_weights,
            handle=handle,
        )

    def _launch(self, call: DispatchCall, parts: KernelParts, scope: CommScope, *, asks_host: bool = False) -> None:
        params, launch = call.params, call.launch_of(parts)
        params.num_stages, params.piece_bytes, params.stages_offset = (
            launch.num_stages,
            launch.piece_bytes,
            launch.offset,
        )
        if asks_host:
            self._host_stamp = params.host_stamp = self._host_stamp % _MAX_STAMP + 1
            params.host_counts = self._context.host_counts_address
        else:
            params.host_counts = None
        launch.run(params, scope.stream_handle)

    def _make_handle(self, call: DispatchCall, args: DispatchArgs, routing: RoutingMemory, sizes: _Sizes) -> EPHandle:
        metadata_memory = routing.storage
        if args.do_cpu_sync:
            metadata_memory = call.new_ints(sizes.num_recv, call.num_topk + 2)
            routing.separate["recv_src_metadata"] = metadata_memory
        metadata_address = call.params.metadata = routing.address_of("recv_src_metadata")
        handle = EPHandle.with_deferred(routing)
        handle.do_expand = call.do_expand
        handle.num_experts = args.num_experts
        handle.expert_alignment = args.expert_alignment
        handle.num_max_tokens_per_rank = args.num_max_tokens_per_rank
        handle.num_sms = args.num_sms
        handle.num_recv_tokens = sizes.num_recv
        handle.num_expanded_tokens = sizes.num_expanded
        handle.num_recv_tokens_per_expert_list = sizes.expert_counts
        handle.num_tokens, handle.num_topk = args.x.shape[0], call.num_topk
        handle.topk_idx_dtype, handle.device = call.idx_dtype, call.device
        handle.plan = DevicePlan(
            ints=routing,
            owned=routing.tensors(),
            metadata_address=metadata_address,
            metadata_version=version_of(metadata_memory),
        )
        handle.buffer_id = self._facts.buffer_id
        handle.dispatch_idx = self._num_dispatches
        return handle
