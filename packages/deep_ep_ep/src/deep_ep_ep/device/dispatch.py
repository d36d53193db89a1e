"""Owns dispatch on the device backend: memory for the results, the kernel's parameters, and the handle."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.align import align_up
from deep_ep_core.cuda_streams import current_stream
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.stream import CommScope
from deep_ep_ep.agreed import agreed_by_dispatch
from deep_ep_ep.backend import DispatchResult
from deep_ep_ep.checks import BufferFacts, DispatchArgs
from deep_ep_ep.device.context import DeviceContext
from deep_ep_ep.device.dispatch_kernel import (
    DispatchConfig,
    DispatchParams,
    dispatch_launch_shape,
    dispatch_spec,
    row_stages,
    side_bytes,
)
from deep_ep_ep.device.opening import BY_EXPERT, OperationKind, agreed_fields, set_agreed
from deep_ep_ep.device.plan import DevicePlan, RoutingMemory, version_of
from deep_ep_ep.handle import EPHandle
from deep_ep_ep.quant import new_tma_aligned_col_major
from deep_ep_ep.sizing import max_expanded_tokens, max_recv_tokens

__all__ = ["Dispatcher"]

# Tokens that a block counts at a time, `kTileTokens`: up to so many, blocks need no memory to add up their counts.
_TILE_TOKENS = 512
_ALIGNMENT = 256
# Stamps of counts go from 1 to this, and round.
_MAX_STAMP = 2**31 - 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Routing:
    """What the plan of a new routing is written to."""

    memory: RoutingMemory
    topk_idx: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Rows of the results."""

    num_recv: int
    num_expanded: int
    expert_counts: list[int]


def _sizes_of(handle: EPHandle) -> _Sizes:
    return _Sizes(
        num_recv=handle.num_recv_tokens,
        num_expanded=handle.num_expanded_tokens,
        expert_counts=handle.num_recv_tokens_per_expert_list,
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
        params = DispatchParams.__new__(DispatchParams)
        params.team, params.wait = context.team, context.wait
        params.state = context.state_address
        params.opening_offset = context.opening_offset
        params.counts_offset = context.counts_offset
        params.arrivals_offset = context.arrivals_offset
        params.counts_capacity = context.counts_capacity
        params.fans_out_at_sender = context.shares_gpu
        self._params = params

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""
        context, params, handle = self._context, self._params, args.handle
        agreed = agreed_by_dispatch(args)
        self._set_arguments(args)
        params.host_counts = None
        if handle is not None:
            context.begin(agreed_fields(OperationKind.PLACE, agreed))
            self._set_plan(handle)
            return self._place(args, None, _sizes_of(handle), scope, has_plan=False)
        routing = _Routing(memory=self._new_routing(args), topk_idx=self._new_topk_idx(args))
        if not args.do_cpu_sync:
            context.begin(agreed_fields(OperationKind.DISPATCH, agreed))
            return self._place(args, routing, self._worst_case(args), scope, has_plan=True)
        if not args.do_expand:
            context.begin(agreed_fields(OperationKind.DISPATCH, agreed))
            return self._place_then_read(args, routing, scope)
        # The worst case by expert is far larger than what comes, so rows do not move before the host knows how many.
        context.begin(agreed_fields(OperationKind.PLAN, agreed))
        params.opening.told[:] = (0, 0)
        self._launch(args, has_plan=True, asks_host=True)
        sizes = self._read_counts(args)
        context.begin(agreed_fields(OperationKind.PLACE, agreed))
        return self._place(args, routing, sizes, scope, has_plan=False)

    def _set_arguments(self, args: DispatchArgs) -> None:
        params, sf = self._params, args.sf
        params.x, params.topk_idx = args.x.data_ptr(), args.topk_idx.data_ptr()
        params.sf = None if sf is None else sf.data_ptr()
        params.sf_token_stride, params.sf_pack_stride = (0, 0) if sf is None else sf.stride()
        params.topk_weights = None if args.topk_weights is None else args.topk_weights.data_ptr()
        params.num_tokens, params.num_topk = args.topk_idx.shape
        params.num_experts, params.num_max_tokens = args.num_experts, args.num_max_tokens_per_rank
        params.expert_alignment = args.expert_alignment
        params.row_bytes = args.x.size(1) * args.x.element_size()
        params.num_sf_packs = 0 if sf is None else sf.size(1)
        params.do_expand, params.do_zero_padding = args.do_expand, args.do_zero_padding
        params.side_bytes = side_bytes(
            num_topk=params.num_topk,
            num_sf_packs=params.num_sf_packs,
            has_weights=args.topk_weights is not None,
            do_expand=args.do_expand,
        )
        # A tensor without elements has no address, and null means that there is none.
        if params.num_tokens == 0 and args.topk_weights is not None:
            params.topk_weights = self._context.state_address

    # The plan

    def _new_routing(self, args: DispatchArgs) -> RoutingMemory:
        """Memory for the plan and the handle, which the kernel is told of."""
        context, params = self._context, self._params
        num_tokens, num_topk = params.num_tokens, params.num_topk
        num_columns = context.num_ranks + args.num_experts
        routing = RoutingMemory(
            context.device,
            num_ranks=context.num_ranks,
            num_local_experts=args.num_experts // context.num_ranks,
            num_tokens=num_tokens,
            num_topk=num_topk,
            do_expand=args.do_expand,
            num_scratch=args.num_sms * num_columns if num_tokens > _TILE_TOKENS else 0,
        )
        address_of = routing.address_of
        params.block_counts = address_of("scratch")
        params.row_of_entry = address_of("row_of_entry")
        params.expert_row_of_entry = address_of("expert_row_of_entry")
        params.num_send_rows = address_of("num_send_rows")
        params.recv_row_ends = address_of("psum_num_recv_tokens_per_scaleup_rank")
        params.expert_ends = address_of("psum_num_recv_tokens_per_expert")
        params.num_expert_rows = address_of("num_unaligned_recv_tokens_per_expert")
        params.dst_slot = address_of("dst_buffer_slot_idx")
        params.recv_stats = None if args.recv_stats is None else args.recv_stats.data_ptr()
        return routing

    def _new_topk_idx(self, args: DispatchArgs) -> torch.Tensor:
        """What the handle keeps of `topk_idx`: a copy that the kernel makes, or the caller's tensor."""
        if not args.do_handle_copy:
            self._params.topk_idx_copy = None
            return args.topk_idx
        copy = torch.empty_like(args.topk_idx)
        self._params.topk_idx_copy = copy.data_ptr()
        return copy

    def _set_plan(self, handle: EPHandle) -> None:
        params, plan = self._params, handle.plan
        assert isinstance(plan, DevicePlan), "handles of other backends do not come here"
        params.block_counts = params.dst_slot = params.topk_idx_copy = params.recv_stats = None
        params.row_of_entry = plan.ints.address_of("row_of_entry")
        params.expert_row_of_entry = plan.ints.address_of("expert_row_of_entry")
        params.num_send_rows = plan.ints.address_of("num_send_rows")
        params.recv_row_ends = handle.address_of("psum_num_recv_tokens_per_scaleup_rank")
        params.expert_ends = handle.address_of("psum_num_recv_tokens_per_expert")
        params.num_expert_rows = handle.address_of("num_unaligned_recv_tokens_per_expert")

    def _read_counts(self, args: DispatchArgs) -> _Sizes:
        """Wait on the host until the kernel that was launched last has told the counts; it may still move rows."""
        context = self._context
        num_local_experts = args.num_experts // context.num_ranks
        context.wait_for_counts(self._params.host_stamp)
        num_recv, *expert_counts = context.host_counts[1 : 2 + num_local_experts].tolist()
        return _Sizes(num_recv=num_recv, num_expanded=sum(expert_counts), expert_counts=expert_counts)

    def _worst_case(self, args: DispatchArgs) -> _Sizes:
        num_ranks = self._context.num_ranks
        return _Sizes(
            num_recv=max_recv_tokens(num_ranks, args.num_max_tokens_per_rank),
            num_expanded=max_expanded_tokens(
                num_ranks,
                args.num_max_tokens_per_rank,
                args.num_topk,
                args.num_experts // num_ranks,
                args.expert_alignment,
            ),
            expert_counts=[],
        )

    # The rows

    def _place(
        self,
        args: DispatchArgs,
        routing: _Routing | None,
        sizes: _Sizes,
        scope: CommScope,
        *,
        has_plan: bool,
    ) -> DispatchResult:
        """Move rows into results whose sizes are known."""
        context = self._context
        shape = (sizes.num_expanded if args.do_expand else sizes.num_recv, args.x.size(1))
        heap = context.memory.heap
        recv_x = None if context.recv_memory == "torch" else heap.try_empty(shape, args.x.dtype)
        x_offset = None if recv_x is None else self._offset_of(recv_x)
        num_slots = max_recv_tokens(context.num_ranks, args.num_max_tokens_per_rank)
        kept = self._tell(args, x_offset, num_sides=sizes.num_recv, num_slots=num_slots)
        if recv_x is None:
            recv_x = torch.empty(shape, dtype=args.x.dtype, device=context.device)
        result = self._new_results(args, routing, sizes, recv_x)
        # One kernel does the epilogue too, so all of it comes behind that event.
        scope.wait_before_epilogue()
        self._launch(args, has_plan=has_plan, has_place=True, has_receive=True)
        del kept
        return result

    def _place_then_read(self, args: DispatchArgs, routing: _Routing, scope: CommScope) -> DispatchResult:
        """Move rows to where the most that may come have room, and make results when the counts are there."""
        context, params = self._context, self._params
        num_slots = max_recv_tokens(context.num_ranks, args.num_max_tokens_per_rank)
        heap, num_bytes = context.memory.heap, num_slots * params.row_bytes
        region = None if context.recv_memory == "torch" else heap.try_reserve(num_bytes)
        x_offset = None if region is None else context.memory.layout.num_bytes + region.offset
        kept = self._tell(args, x_offset, num_sides=num_slots, num_slots=num_slots)
        self._launch(args, has_plan=True, has_place=True, asks_host=True)
        sizes = self._read_counts(args)
        shape = (sizes.num_recv, args.x.size(1))
        if region is None:
            recv_x = torch.empty(shape, dtype=args.x.dtype, device=context.device)
        else:
            recv_x = region.take(shape, args.x.dtype)
        result = self._new_results(args, routing, sizes, recv_x)
        scope.wait_before_epilogue()
        self._launch(args, has_receive=True)
        del kept
        return result

    def _tell(self, args: DispatchArgs, x_offset: int | None, *, num_sides: int, num_slots: int) -> list[torch.Tensor]:
        """Decide where peers put rows and side records; the results' own memory is at `x_offset`, if in the window.

        Args:
            args: The call.
            x_offset: Offset of the results' rows in the window; None stages them.
            num_sides: The most rows that may come to this rank.
            num_slots: The most rows that may come to any rank.

        Returns:
            What must live until the kernels that use it are launched.
        """
        context, params, kept = self._context, self._params, []
        params.is_staged = x_offset is None
        if context.stage_offset is not None:
            side_offset = context.stage_offset
            if x_offset is None:
                x_offset = side_offset + align_up(num_slots * params.side_bytes, _ALIGNMENT)
        else:
            sizes = [num_sides * params.side_bytes] + ([num_sides * params.row_bytes] if x_offset is None else [])
            kept = [context.memory.heap.empty((max(size, 1),), torch.uint8) for size in sizes]
            side_offset = self._offset_of(kept[0])
            if x_offset is None:
                x_offset = self._offset_of(kept[1])
        by_expert = BY_EXPERT if args.do_expand and not params.is_staged else 0
        params.opening.told[:] = (x_offset, side_offset | by_expert)
        return kept

    def _new_results(
        self, args: DispatchArgs, routing: _Routing | None, sizes: _Sizes, recv_x: torch.Tensor
    ) -> DispatchResult:
        """Memory for the other results, which the kernel is told of."""
        params, device, num_topk = self._params, self._context.device, args.num_topk
        num_rows = recv_x.size(0)
        recv_topk_idx = recv_weights = recv_sf = metadata = None
        if not args.do_expand:
            recv_topk_idx = torch.empty(num_rows, num_topk, dtype=args.topk_idx.dtype, device=device)
        if args.topk_weights is not None:
            shape = (num_rows,) if args.do_expand else (num_rows, num_topk)
            recv_weights = torch.empty(shape, dtype=torch.float32, device=device)
        if args.sf is not None:
            if args.use_tma_aligned_col_major_sf:
                recv_sf = new_tma_aligned_col_major(args.sf, num_rows)
            else:
                recv_sf = args.sf.new_empty(num_rows, args.sf.size(1))
        if args.handle is not None:
            handle = args.handle
        else:
            assert routing is not None, "a call without a handle has a new routing"
            metadata = torch.empty(sizes.num_recv, num_topk + 2, dtype=torch.int32, device=device)
            handle = self._make_handle(args, routing, sizes, metadata)
        params.recv_x = recv_x.data_ptr()
        params.recv_topk_idx = None if recv_topk_idx is None else recv_topk_idx.data_ptr()
        params.recv_topk_weights = None if recv_weights is None else recv_weights.data_ptr()
        params.recv_sf = None if recv_sf is None else recv_sf.data_ptr()
        params.recv_sf_row_stride, params.recv_sf_pack_stride = (0, 0) if recv_sf is None else recv_sf.stride()
        params.metadata = None if metadata is None else metadata.data_ptr()
        return DispatchResult(
            recv_x=recv_x,
            recv_sf=recv_sf,
            recv_topk_idx=recv_topk_idx,
            recv_topk_weights=recv_weights,
            handle=handle,
        )

    def _offset_of(self, tensor: torch.Tensor) -> int:
        offset = self._context.memory.offset_of(tensor)
        assert offset is not None, "the tensor is of the heap"
        return offset

    def _launch(
        self,
        args: DispatchArgs,
        *,
        has_plan: bool = False,
        has_place: bool = False,
        has_receive: bool = False,
        asks_host: bool = False,
    ) -> None:
        context, params = self._context, self._params
        is_idx64 = args.topk_idx.dtype == torch.int64
        num_sms = args.num_sms
        stages = row_stages(params.row_bytes, plan_columns=context.num_ranks + args.num_experts if has_plan else 0)
        params.num_stages, params.piece_bytes, params.stages_offset = (
            stages.num_stages,
            stages.piece_bytes,
            stages.offset,
        )

        def make() -> tuple[KernelSpec, LaunchShape]:
            config = DispatchConfig(has_plan=has_plan, has_place=has_place, has_receive=has_receive, is_idx64=is_idx64)
            return dispatch_spec(config), dispatch_launch_shape(num_sms=num_sms, stages=stages)

        launch = context.launch((has_plan, has_place, has_receive, is_idx64, num_sms, stages), make)
        set_agreed(params.opening, context.fields)
        params.host_counts = None
        if asks_host:
            params.host_stamp = params.host_stamp % _MAX_STAMP + 1
            params.host_counts = context.host_counts.data_ptr()
        launch(params, current_stream(context.device_idx).cuda_stream)

    def _make_handle(self, args: DispatchArgs, routing: _Routing, sizes: _Sizes, metadata: torch.Tensor) -> EPHandle:
        self._num_dispatches += 1
        memory = routing.memory
        return EPHandle.with_deferred(
            memory,
            do_expand=args.do_expand,
            num_experts=args.num_experts,
            expert_alignment=args.expert_alignment,
            num_max_tokens_per_rank=args.num_max_tokens_per_rank,
            num_sms=args.num_sms,
            topk_idx=routing.topk_idx,
            num_recv_tokens=sizes.num_recv,
            num_expanded_tokens=sizes.num_expanded,
            num_recv_tokens_per_expert_list=sizes.expert_counts,
            recv_src_metadata=metadata,
            plan=DevicePlan(
                ints=memory, owned=(memory.storage,), metadata=metadata, metadata_version=version_of(metadata)
            ),
            buffer_id=self._facts.buffer_id,
            dispatch_idx=self._num_dispatches,
        )
