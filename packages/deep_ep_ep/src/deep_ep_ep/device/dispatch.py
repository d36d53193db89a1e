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


@dataclass(slots=True, eq=False)
class _Sides:
    """The results beside the rows."""

    topk_idx: torch.Tensor | None
    weights: torch.Tensor | None
    sf: torch.Tensor | None

    def shrink(self, num_rows: int) -> None:
        """Leave only the first rows. In place, not by a view, which a caller could not change under autograd."""
        for tensor in (self.topk_idx, self.weights, self.sf):
            if tensor is not None:
                tensor.resize_(num_rows, tensor.size(1))

    def result(self, recv_x: torch.Tensor, handle: EPHandle) -> DispatchResult:
        """All results."""
        return DispatchResult(
            recv_x=recv_x,
            recv_sf=self.sf,
            recv_topk_idx=self.topk_idx,
            recv_topk_weights=self.weights,
            handle=handle,
        )


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
        if not args.do_expand:
            self._begin(call, OperationKind.DISPATCH)
            return self._place_and_read(call, args, scope)
        # The worst case by expert is far larger than what comes, so rows do not move before the host knows how many.
        memory = self._new_routing(call, args, num_metadata_rows=0)
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
        num_rows = sizes.num_expanded if call.do_expand else sizes.num_recv
        region = self._reserve(call, num_rows)
        kept = self._tell(call, region, num_sides=sizes.num_recv)
        recv_x = None
        if region is not None:
            call.params.recv_x = region.address
        else:
            recv_x = call.new_x(num_rows, call.hidden)
            call.params.recv_x = recv_x.data_ptr()
        sides = self._new_sides(call, args, num_rows)
        if routing is not None:
            if args.do_cpu_sync:
                routing.separate["recv_src_metadata"] = call.new_ints(sizes.num_recv, call.num_topk + 2)
            call.params.metadata = routing.address_of("recv_src_metadata")
        # One kernel does the epilogue too, so all of it comes behind that event.
        scope.wait_before_epilogue()
        self._launch(call, parts, scope)
        # What the kernel need not know of is made while it runs.
        if recv_x is None:
            assert region is not None, "rows have a place"
            recv_x = region.take((num_rows, call.hidden), call.dtype)
        handle = args.handle
        if handle is None:
            assert routing is not None, "a call without a handle has a new routing"
            handle = self._new_handle(call, args, routing, sizes)
        del kept
        return sides.result(recv_x, handle)

    def _place_and_read(self, call: DispatchCall, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Move rows to where the most that may come have room, while the host waits for how many they are."""
        region = self._reserve(call, call.num_slots)
        kept = self._tell(call, region, num_sides=call.num_slots)
        if region is not None and call.are_sides_small:
            result = self._receive_then_read(call, args, region, scope)
        else:
            result = self._read_then_receive(call, args, region, scope)
        del kept
        return result

    def _receive_then_read(
        self, call: DispatchCall, args: DispatchArgs, region: Reservation, scope: CommScope
    ) -> DispatchResult:
        """All in one kernel: also what lies beside the rows has room for the most that may come, and shrinks then."""
        routing = self._new_routing(call, args, num_metadata_rows=call.num_slots)
        sides = self._new_sides(call, args, call.num_slots)
        call.params.recv_x = region.address
        call.params.metadata = routing.address_of("recv_src_metadata")
        scope.wait_before_epilogue()
        self._launch(call, ALL_PARTS, scope, asks_host=True)
        sizes = self._read_counts(call)
        sides.shrink(sizes.num_recv)
        routing.shrink_metadata(sizes.num_recv)
        recv_x = region.take((sizes.num_recv, call.hidden), call.dtype)
        return sides.result(recv_x, self._new_handle(call, args, routing, sizes))

    def _read_then_receive(
        self, call: DispatchCall, args: DispatchArgs, region: Reservation | None, scope: CommScope
    ) -> DispatchResult:
        """Two kernels: what lies beside the rows is written by the second, when the host knows how many there are."""
        # Memory for the worst case would live as long as the handle, so metadata of known size have their own.
        routing = self._new_routing(call, args, num_metadata_rows=0)
        self._launch(call, PLAN_AND_PLACE, scope, asks_host=True)
        sizes = self._read_counts(call)
        if region is None:
            recv_x = call.new_x(sizes.num_recv, call.hidden)
        else:
            recv_x = region.take((sizes.num_recv, call.hidden), call.dtype)
        call.params.recv_x = recv_x.data_ptr()
        sides = self._new_sides(call, args, sizes.num_recv)
        routing.separate["recv_src_metadata"] = call.new_ints(sizes.num_recv, call.num_topk + 2)
        call.params.metadata = routing.address_of("recv_src_metadata")
        scope.wait_before_epilogue()
        self._launch(call, RECEIVE, scope)
        return sides.result(recv_x, self._new_handle(call, args, routing, sizes))

    def _reserve(self, call: DispatchCall, num_rows: int) -> Reservation | None:
        """A place in the window for so many rows; None where there is none."""
        return None if call.stages_all else self._context.memory.heap.try_reserve(num_rows * call.row_bytes)

    def _tell(self, call: DispatchCall, region: Reservation | None, *, num_sides: int) -> list[Reservation]:
        """Decide where peers put rows and side records.

        Args:
            call: What the call shares with others.
            region: Place of the results' rows in the window; None stages them.
            num_sides: The most rows that may come to this rank.

        Returns:
            What must live until the kernels that use it are launched.
        """
        memory, kept = self._context.memory, []
        is_staged = region is None
        x_offset = None if region is None else memory.layout.num_bytes + region.offset
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

    def _new_sides(self, call: DispatchCall, args: DispatchArgs, num_rows: int) -> _Sides:
        """Memory for what lies beside so many rows, which the kernel is told of."""
        params, num_topk = call.params, call.num_topk
        topk_idx = weights = sf = None
        if not call.do_expand:
            topk_idx = call.new_idx(num_rows, num_topk)
            params.recv_topk_idx = topk_idx.data_ptr()
        if args.topk_weights is not None:
            weights = call.new_weights(num_rows) if call.do_expand else call.new_weights(num_rows, num_topk)
            params.recv_topk_weights = weights.data_ptr()
        if args.sf is not None:
            if args.use_tma_aligned_col_major_sf:
                sf = new_tma_aligned_col_major(args.sf, num_rows)
            else:
                sf = args.sf.new_empty(num_rows, call.num_sf_packs)
            params.recv_sf = sf.data_ptr()
            params.recv_sf_row_stride, params.recv_sf_pack_stride = sf.stride()
        return _Sides(topk_idx, weights, sf)

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

    def _new_handle(self, call: DispatchCall, args: DispatchArgs, routing: RoutingMemory, sizes: _Sizes) -> EPHandle:
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
            metadata_address=routing.address_of("recv_src_metadata"),
            metadata_version=version_of(routing.separate.get("recv_src_metadata", routing.storage)),
        )
        handle.buffer_id = self._facts.buffer_id
        handle.dispatch_idx = self._num_dispatches
        return handle
