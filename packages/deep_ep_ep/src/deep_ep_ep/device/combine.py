"""Owns combine on the device backend: how a rank's rows reach the ranks that sum them, and the kernel's parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deep_ep_core.heap import Reservation
from deep_ep_core.jit import KernelSpec, LaunchShape
from deep_ep_core.jit.structs import ParamsStruct
from deep_ep_core.stream import CommScope
from deep_ep_ep.agreed import HANDLE_NAME, agreed_by_combine
from deep_ep_ep.backend import CombineResult
from deep_ep_ep.checks import BufferFacts, CombineArgs
from deep_ep_ep.device.combine_kernel import CombineParams, combine_launch_shape, combine_slab_bytes, combine_spec
from deep_ep_ep.device.context import DeviceContext
from deep_ep_ep.device.opening import PUSHED, AgreedValues, OperationKind
from deep_ep_ep.device.plan import DevicePlan, source_order

__all__ = ["Combiner"]


class _CombineCall:
    """What combines of one kind share. They come one at a time, and write the rest of the parameters.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
        args: The first of them.

    Attributes:
        params: The kernel's parameters.
        told: `params.opening.told`.
        biases: `params.biases`.
        agreed: `params.opening.agreed`, and its fields.
        hidden, num_topk: Of the arguments.
        rows_bytes: Bytes of the slab's rows.
        weights_bytes: Bytes of the weights behind them.
        new_x, new_weights: Make a tensor like the results, of the shape that they are passed, values undefined.
    """

    def __init__(self, context: DeviceContext, facts: BufferFacts, args: CombineArgs) -> None:
        handle, x, device = args.handle, args.x, context.device
        self._context = context
        self._variant = x.dtype, handle.topk_idx_dtype, min(args.num_sms, context.max_num_sms)
        self._launch: Callable[[ParamsStruct, int], None] | None = None
        self.hidden, self.num_topk = x.size(1), handle.num_topk
        self.params = params = CombineParams.__new__(CombineParams)
        params.team, params.wait = context.team, context.wait
        params.state = context.state_address
        params.opening_offset = context.opening_offset
        params.arrivals_offset = context.arrivals_offset
        params.num_topk = handle.num_topk
        params.num_experts, params.num_max_tokens = handle.num_experts, handle.num_max_tokens_per_rank
        params.row_bytes = x.size(1) * x.element_size()
        params.do_expand = handle.do_expand
        params.is_single_rounding = handle.do_expand and not facts.allow_multiple_reduction
        params.has_weights = args.topk_weights is not None
        self.told, self.biases = params.opening.told, params.biases
        self.agreed = AgreedValues(params.opening, agreed_by_combine(args), handle_name=HANDLE_NAME)
        sizes = {
            "num_ranks": context.num_ranks,
            "num_topk": handle.num_topk,
            "num_max_tokens": handle.num_max_tokens_per_rank,
            "row_bytes": params.row_bytes,
            "is_single_rounding": params.is_single_rounding,
        }
        self.rows_bytes = combine_slab_bytes(**sizes, has_weights=False)
        self.weights_bytes = combine_slab_bytes(**sizes, has_weights=params.has_weights) - self.rows_bytes
        # A tensor's own `new_empty` takes the host less time than `torch.empty`.
        self.new_x: Callable[..., torch.Tensor] = torch.empty(0, dtype=x.dtype, device=device).new_empty
        self.new_weights: Callable[..., torch.Tensor] = torch.empty(0, dtype=torch.float32, device=device).new_empty

    def launch(self, stream: int) -> None:
        """Launch the kernel; compiled the first time."""
        if self._launch is None:
            dtype, idx_dtype, num_sms = self._variant

            def make() -> tuple[KernelSpec, LaunchShape]:
                return combine_spec(dtype=dtype, idx_dtype=idx_dtype), combine_launch_shape(num_sms)

            self._launch = self._context.launch(("combine", *self._variant), make)
        self._launch(self.params, stream)


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

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""
        context, handle = self._context, args.handle
        plan = handle.plan
        assert isinstance(plan, DevicePlan), "handles of other backends do not come here"
        call = args.kind.prepared
        if call is None:
            call = args.kind.prepared = _CombineCall(context, self._facts, args)
        assert isinstance(call, _CombineCall), "a kind is of one operation"
        context.begin(call.agreed.begin(OperationKind.COMBINE, handle.dispatch_idx))
        params = call.params
        # The source of the rows is decided last: it may replace x, weights and metadata.
        x, weights = args.x, args.topk_weights
        # None: nobody has asked for it yet, so it cannot have been permuted.
        metadata = handle.made("recv_src_metadata")
        has_row_order = metadata is None or plan.has_row_order(metadata)
        metadata_address = plan.metadata_address if metadata is None else metadata.data_ptr()
        x_offset = context.memory.offset_of(x)
        if x_offset is not None:
            if scope.is_crossed and scope.comm_stream is not None:
                context.memory.heap.record_stream(x, scope.comm_stream)
            if not has_row_order:
                x_offset = None
        if x_offset is None and context.stage_offset is None:
            x, weights = self._bring_into_window(args, has_row_order=has_row_order)
            metadata_address = plan.metadata_address
            x_offset = context.memory.offset_of(x)
        slab_offset, kept = self._slab(call)
        call.told[0] = PUSHED if x_offset is None else x_offset
        call.told[1] = slab_offset
        params.num_tokens = handle.num_tokens
        params.x = x.data_ptr()
        params.metadata = metadata_address
        params.recv_row_ends = handle.address_of("psum_num_recv_tokens_per_scaleup_rank")
        params.topk_idx = handle.address_of("topk_idx")
        address_of = plan.ints.address_of
        params.num_send_rows = address_of("num_send_rows")
        params.row_of_entry = address_of("row_of_entry")
        params.expert_row_of_entry = address_of("expert_row_of_entry")
        for bias_idx, bias in enumerate(args.biases):
            call.biases[bias_idx] = bias.data_ptr()
        # One kernel does the epilogue too, so all of it comes behind that event.
        scope.wait_before_epilogue()
        out, out_weights = call.new_x(handle.num_tokens, call.hidden), None
        params.out = out.data_ptr()
        if weights is not None:
            out_weights = call.new_weights(handle.num_tokens, call.num_topk)
            params.weights, params.out_weights = weights.data_ptr(), out_weights.data_ptr()
        call.launch(scope.stream_handle)
        del kept
        return CombineResult(combined_x=out, combined_topk_weights=out_weights)

    @torch.no_grad()
    def _bring_into_window(self, args: CombineArgs, *, has_row_order: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Copies of the rows in the window, as dispatch laid them: without a stage there is no place to push to."""
        handle, heap = args.handle, self._context.memory.heap
        x = heap.empty(args.x.shape, args.x.dtype)
        # Rows that lie by expert lie so in any case; only the metadata was permuted.
        if handle.do_expand or has_row_order:
            x.copy_(args.x)
            return x, args.topk_weights
        order = source_order(handle.recv_src_metadata, handle.psum_num_recv_tokens_per_scaleup_rank)
        torch.index_select(args.x, 0, order, out=x)
        weights = None if args.topk_weights is None else args.topk_weights.index_select(0, order)
        return x, weights

    def _slab(self, call: _CombineCall) -> tuple[int, Reservation | None]:
        """Where peers put what they push to this rank, and what must live until the kernel is launched."""
        memory, stage_offset = self._context.memory, self._context.stage_offset
        if stage_offset is not None:
            return stage_offset, None
        if not call.weights_bytes:
            return 0, None
        kept = memory.heap.reserve(call.weights_bytes)
        # No rows are pushed in such a buffer, so the slab begins where its weights come to lie there: offsets wrap.
        return (memory.layout.num_bytes + kept.offset - call.rows_bytes) % 2**64, kept
