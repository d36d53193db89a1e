"""Owns combine on the device backend: how a rank's rows reach the ranks that sum them, and the kernel's parameters."""

from __future__ import annotations

import torch

from deep_ep_core.cuda_streams import current_stream
from deep_ep_core.stream import CommScope
from deep_ep_ep.agreed import agreed_by_combine
from deep_ep_ep.backend import CombineResult
from deep_ep_ep.checks import BufferFacts, CombineArgs
from deep_ep_ep.device.combine_kernel import CombineParams, combine_launch_shape, combine_slab_bytes, combine_spec
from deep_ep_ep.device.context import DeviceContext
from deep_ep_ep.device.opening import PUSHED, OperationKind, agreed_fields, set_agreed
from deep_ep_ep.device.plan import DevicePlan

__all__ = ["Combiner"]


class Combiner:
    """Combines through a context. Calls are made under a `CommScope`, one at a time.

    Where `x` is in the window, and its rows lie as dispatch laid them, the ranks of the tokens read them there.
    Otherwise this rank pushes them to those ranks' stages. Each rank decides for itself, and tells the others.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
    """

    def __init__(self, context: DeviceContext, facts: BufferFacts) -> None:
        self._context = context
        self._facts = facts
        params = CombineParams.__new__(CombineParams)
        params.team, params.wait = context.team, context.wait
        params.state = context.state_address
        params.opening_offset = context.opening_offset
        params.arrivals_offset = context.arrivals_offset
        self._params = params

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""
        context, params, handle = self._context, self._params, args.handle
        plan = handle.plan
        assert isinstance(plan, DevicePlan), "handles of other backends do not come here"
        context.begin(agreed_fields(OperationKind.COMBINE, agreed_by_combine(args)))
        num_tokens, num_topk = handle.topk_idx.shape
        hidden = args.x.size(1)
        has_weights = args.topk_weights is not None
        params.num_tokens, params.num_topk = num_tokens, num_topk
        params.num_experts, params.num_max_tokens = handle.num_experts, handle.num_max_tokens_per_rank
        params.row_bytes = hidden * args.x.element_size()
        params.do_expand = handle.do_expand
        params.is_single_rounding = handle.do_expand and not self._facts.allow_multiple_reduction
        params.has_weights = has_weights
        # The source of the rows is decided last: it may replace x, weights and metadata.
        x, weights, metadata = args.x, args.topk_weights, handle.recv_src_metadata
        x_offset = context.memory.offset_of(x)
        if x_offset is not None:
            if scope.comm_stream is not None and scope.comm_stream != scope.compute_stream:
                context.memory.heap.record_stream(x, scope.comm_stream)
            if not plan.has_row_order(metadata):
                x_offset = None
        if x_offset is None and context.stage_offset is None:
            x, weights, metadata = self._bring_into_window(args, plan)
            x_offset = context.memory.offset_of(x)
        params.opening.told[0] = PUSHED if x_offset is None else x_offset
        params.opening.told[1] = self._slab_offset()
        params.x = x.data_ptr()
        params.weights = None if weights is None else weights.data_ptr()
        params.metadata = metadata.data_ptr()
        params.recv_row_ends = handle.address_of("psum_num_recv_tokens_per_scaleup_rank")
        params.num_send_rows = plan.ints.address_of("num_send_rows")
        params.topk_idx = handle.topk_idx.data_ptr()
        params.row_of_entry = plan.ints.address_of("row_of_entry")
        params.expert_row_of_entry = plan.ints.address_of("expert_row_of_entry")
        for bias_idx in range(2):
            params.biases[bias_idx] = args.biases[bias_idx].data_ptr() if bias_idx < len(args.biases) else None
        # One kernel does the epilogue too, so all of it comes behind that event.
        scope.wait_before_epilogue()
        out = torch.empty(num_tokens, hidden, dtype=x.dtype, device=context.device)
        out_weights = (
            torch.empty(num_tokens, num_topk, dtype=torch.float32, device=context.device) if has_weights else None
        )
        params.out = out.data_ptr()
        params.out_weights = None if out_weights is None else out_weights.data_ptr()
        set_agreed(params.opening, context.fields)
        dtype, idx_dtype, num_sms = x.dtype, handle.topk_idx.dtype, args.num_sms
        launch = context.launch(
            ("combine", dtype, idx_dtype, num_sms),
            lambda: (combine_spec(dtype=dtype, idx_dtype=idx_dtype), combine_launch_shape(num_sms)),
        )
        launch(params, current_stream(context.device_idx).cuda_stream)
        return CombineResult(combined_x=out, combined_topk_weights=out_weights)

    def _bring_into_window(
        self, args: CombineArgs, plan: DevicePlan
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Copies of the rows in the window, as dispatch laid them: without a stage there is no place to push to."""
        handle, heap = args.handle, self._context.memory.heap
        x = heap.empty(args.x.shape, args.x.dtype)
        if plan.has_row_order(handle.recv_src_metadata):
            x.copy_(args.x)
            return x, args.topk_weights, plan.metadata
        if handle.do_expand:
            # Rows lie by expert in any case; only the metadata was permuted.
            x.copy_(args.x)
            return x, args.topk_weights, plan.metadata
        num_recv = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        order = handle.recv_src_metadata[:num_recv, 0].argsort()
        torch.index_select(args.x, 0, order, out=x[:num_recv])
        weights = None if args.topk_weights is None else args.topk_weights.index_select(0, order)
        return x, weights, plan.metadata

    def _slab_offset(self) -> int:
        """Where peers put what they push to this rank."""
        context, params = self._context, self._params
        if context.stage_offset is not None:
            return context.stage_offset
        if not params.has_weights:
            return 0
        sizes = {
            "num_ranks": context.num_ranks,
            "num_topk": params.num_topk,
            "num_max_tokens": params.num_max_tokens,
            "row_bytes": params.row_bytes,
            "is_single_rounding": params.is_single_rounding,
        }
        rows_bytes = combine_slab_bytes(**sizes, has_weights=False)
        weights = context.memory.heap.empty((combine_slab_bytes(**sizes, has_weights=True) - rows_bytes,), torch.uint8)
        weights_offset = context.memory.offset_of(weights)
        assert weights_offset is not None, "the tensor is of the heap"
        # No rows are pushed in such a buffer, so the slab begins where its weights come to lie there: offsets wrap.
        return (weights_offset - rows_bytes) % 2**64
