"""Owns combine across nodes: how rows get where the ranks of a node read them, and the kernels' parameters."""

from __future__ import annotations

import torch

from deep_ep_core.stream import CommScope
from deep_ep_ep.agreed import HANDLE_NAME, agreed_by_combine
from deep_ep_ep.backend import CombineResult
from deep_ep_ep.checks import BufferFacts, CombineArgs
from deep_ep_ep.device.combine_kernel import combine_launch_shape
from deep_ep_ep.device.network.combine_kernels import (
    NetworkCombineParams,
    forward_spec,
    return_bytes,
    stage_spec,
    sum_rows_spec,
)
from deep_ep_ep.device.network.context import NetworkContext
from deep_ep_ep.device.network.dispatch_kernels import chunk_rows
from deep_ep_ep.device.network.plan import NetworkPlan
from deep_ep_ep.device.opening import AgreedValues, OperationKind
from deep_ep_ep.device.plan import source_order
from deep_ep_ep.handle import EPHandle

__all__ = ["NetworkCombiner"]

_WEIGHT_BYTES = 4


class _CombineCall:
    """What combines of one kind share. They come one at a time, and write the rest of the parameters.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
        args: The first of them.

    Attributes:
        gin: Parameters of the kernels with GIN; `params` is its part that all kernels have.
        params: See above.
        exchange: Parameters of the exchange.
        agreed: The agreed values of its opening.
        row_bytes: Bytes of a row.
        weights_bytes: Bytes of a row's weights; 0 if there are none.
        sums_on_own_rank: Rows by expert are added up by their own rank first.
    """

    def __init__(self, context: NetworkContext, facts: BufferFacts, args: CombineArgs) -> None:
        handle, x, num_ranks = args.handle, args.x, context.num_ranks
        num_topk, max_tokens = handle.num_topk, handle.num_max_tokens_per_rank
        self._context = context
        self._num_sms = min(args.num_sms, context.max_num_sms)
        self._dtype, self._idx_dtype = x.dtype, handle.topk_idx_dtype
        is_hybrid = context.options.is_hybrid
        is_single_rounding = handle.do_expand and not facts.allow_multiple_reduction
        is_hierarchical = is_hybrid and facts.allow_multiple_reduction
        has_weights = args.topk_weights is not None
        self.sums_on_own_rank = handle.do_expand and not is_single_rounding
        self.row_bytes = x.size(1) * x.element_size()
        self.weights_bytes = num_topk * _WEIGHT_BYTES if has_weights else 0
        self.gin = context.new_gin_call(NetworkCombineParams, "deep_ep_ep::NetworkCombineCall")
        self.params: NetworkCombineParams = self.gin.call
        params = self.params
        params.net = context.network(num_qps=context.num_qps_of(args))
        params.num_topk, params.num_experts, params.num_max_tokens = num_topk, handle.num_experts, max_tokens
        params.row_bytes = self.row_bytes
        params.return_bytes = return_bytes(row_bytes=self.row_bytes, num_topk=num_topk, has_weights=has_weights)
        params.num_layers = num_topk if is_single_rounding else min(num_ranks, num_topk)
        # A record is handed on to the ranks of a node in hybrid mode, else to one.
        num_behind = num_ranks // context.num_nodes if is_hybrid else 1
        params.max_record_rows = num_topk if is_single_rounding else min(num_behind, num_topk)
        params.chunk_rows = chunk_rows(params.return_bytes)
        params.do_expand = handle.do_expand
        params.is_single_rounding = is_single_rounding
        params.is_hierarchical, params.has_weights = is_hierarchical, has_weights
        num_records = context.num_relays * max_tokens
        num_returned = num_records if is_hierarchical else max_tokens * params.num_layers
        num_sent = num_records if is_hierarchical else num_records * params.max_record_rows
        params.return_offset, params.send_offset = context.divide_slabs(
            "the rows of a combine", [num_returned * params.return_bytes, num_sent * params.return_bytes]
        )
        self.exchange = context.new_exchange(num_qps=context.num_qps_of(args))
        self.agreed = AgreedValues(self.exchange.call.opening, agreed_by_combine(args), handle_name=HANDLE_NAME)

    def tell(self, x_offset: int, weights_offset: int) -> None:
        """What the opening tells: where the ranks of the node find rows and weights in this rank's window."""
        told = self.exchange.call.opening.told
        told[0], told[1] = x_offset, weights_offset

    def launch(self, stream: int) -> None:
        """Launch the kernels; compiled the first time."""
        context, num_sms, dtype, idx_dtype = self._context, self._num_sms, self._dtype, self._idx_dtype
        shape, dev_comm_bytes = combine_launch_shape(num_sms), context.dev_comm_bytes
        if self.params.staged_x or self.params.has_weights:
            stage = context.launch(("stage", dtype, num_sms), lambda: (stage_spec(dtype=dtype), shape))
            stage(self.params, stream)
        context.exchange(self.exchange, stream)
        forward = context.launch(
            ("forward", dtype, num_sms), lambda: (forward_spec(dev_comm_bytes, dtype=dtype), shape)
        )
        forward(self.gin, stream)
        finish = context.launch(
            ("sum rows", dtype, idx_dtype, num_sms),
            lambda: (sum_rows_spec(dev_comm_bytes, dtype=dtype, idx_dtype=idx_dtype), shape),
        )
        finish(self.gin, stream)


class NetworkCombiner:
    """Combines through a context. Calls are made under a `CommScope`, one at a time.

    Where `x` is in the window, and its rows are what goes back, the ranks of the node read them there. Otherwise this
    rank stages them, or the sums of its rows by expert.

    Args:
        context: The memory and the kernels.
        facts: What the buffer's checks know.
    """

    def __init__(self, context: NetworkContext, facts: BufferFacts) -> None:
        self._context = context
        self._facts = facts

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""
        context, handle = self._context, args.handle
        plan = handle.plan
        assert isinstance(plan, NetworkPlan), "handles of other backends do not come here"
        call = args.kind.prepared
        if call is None:
            call = args.kind.prepared = _CombineCall(context, self._facts, args)
        assert isinstance(call, _CombineCall), "a kind is of one operation"
        context.begin(call.agreed.begin(OperationKind.COMBINE, handle.dispatch_idx))
        with context.refusing(scope.stream_handle):
            # What is made here must live until the kernels are launched.
            x, weights, metadata = _in_row_order(args, plan)
            self._stage(call, handle, x, scope)
            out, out_weights = x.new_empty(handle.num_tokens, x.size(1)), None
            if weights is not None:
                out_weights = weights.new_empty(handle.num_tokens, handle.num_topk)
        params = call.params
        params.num_tokens = handle.num_tokens
        params.x, params.metadata, params.out = x.data_ptr(), metadata.data_ptr(), out.data_ptr()
        if weights is not None and out_weights is not None:
            params.weights, params.out_weights = weights.data_ptr(), out_weights.data_ptr()
        params.recv_row_ends = plan.recv_row_ends.data_ptr()
        params.expert_ends = handle.psum_num_recv_tokens_per_expert.data_ptr()
        params.topk_idx = handle.topk_idx.data_ptr()
        params.row_of_entry, params.slot_of_entry = plan.row_of_entry.data_ptr(), plan.slot_of_entry.data_ptr()
        params.relay_counts, params.forward_table = plan.relay_counts.data_ptr(), plan.forward_table.data_ptr()
        for bias_idx, bias in enumerate(args.biases):
            # A tensor without elements has no address, and null means that there is none.
            params.biases[bias_idx] = bias.data_ptr() or None
        # The kernels before the last one need what was passed, so all of them come behind that event.
        scope.wait_before_epilogue()
        call.launch(scope.stream_handle)
        return CombineResult(combined_x=out, combined_topk_weights=out_weights)

    def _stage(self, call: _CombineCall, handle: EPHandle, x: torch.Tensor, scope: CommScope) -> None:
        """Decide where the ranks of the node read this rank's rows and weights."""
        context, params = self._context, call.params
        x_offset = context.memory.offset_of(x)
        if x_offset is not None and scope.is_crossed and scope.comm_stream is not None:
            context.memory.heap.record_stream(x, scope.comm_stream)
        if call.sums_on_own_rank:
            x_offset = None
        num_rows = x.size(0) if handle.do_expand and params.is_single_rounding else handle.num_recv_tokens
        staged_bytes = num_rows * call.row_bytes if x_offset is None else 0
        staged_offset, weights_offset = context.divide_stage(
            "the rows of a combine that do not lie in the window",
            [staged_bytes, handle.num_recv_tokens * call.weights_bytes],
        )
        address = context.memory.address
        params.staged_x = address + staged_offset if x_offset is None else None
        params.staged_weights = address + weights_offset
        call.tell(staged_offset if x_offset is None else x_offset, weights_offset)


@torch.no_grad()
def _in_row_order(args: CombineArgs, plan: NetworkPlan) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Rows, weights and metadata as dispatch laid them, also where they come permuted. Nothing waits on the host."""
    x, weights, handle = args.x, args.topk_weights, args.handle
    metadata = handle.recv_src_metadata
    if plan.has_row_order(metadata):
        return x, weights, metadata
    order = source_order(metadata, plan.recv_row_ends)
    metadata = metadata.index_select(0, order)
    # Rows by expert lie so in any case; only the metadata was permuted.
    if handle.do_expand:
        return x, weights, metadata
    weights = None if weights is None else weights.index_select(0, order)
    return x.index_select(0, order), weights, metadata
