"""Owns the differentiable dispatch and combine, and the `torch.library` operators beneath them.

The backward of a dispatch is a combine and the other way round, gradients of the routing weights included. The
operators take and return tensors and numbers only, so they trace under `torch.compile`; a buffer is named by a number
and a handle travels as its tensors, see `handle_tensors`. With exact sizes (`do_cpu_sync=True`) the shapes depend on
the data, which `torch.compile` answers with a graph break unless
`torch._dynamo.config.capture_dynamic_output_shape_ops` is on; with worst-case sizes a block compiles whole.

Every row that no token stands behind (padding between experts, the tail of a worst-case tensor) is zero here, its
experts -1, in the forward and in the backward pass, so that it adds nothing to a parameter's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# The first custom operator imports this module. Should a process group exist by then, the module keeps it alive as a
# default argument, and gloo's threads outlive `destroy_process_group`; so it comes in here, before groups are made.
import torch.distributed.nn.functional
from torch import Tensor

from deep_ep_core.errors import ConfigError
from deep_ep_ep.buffer import ElasticBuffer, live_buffer
from deep_ep_ep.handle import EPHandle, RoutingPlan
from deep_ep_ep.handle_tensors import handle_from_tensors, named_tensor, new_handle_tensors, tensors_of_handle
from deep_ep_ep.routing import align_up_tensor
from deep_ep_ep.sizing import max_expanded_tokens, max_recv_tokens

__all__ = ["Combined", "Dispatched", "Routing", "combine", "dispatch"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Routing:
    """The routing of one differentiable dispatch, as tensors.

    Attributes:
        tensors: What the operators need, in the order of `handle_tensors`.
        num_experts: Experts of all ranks.
        num_max_tokens_per_rank: M of the dispatch.
        expert_alignment: Each expert's rows start at a multiple of this.
        do_expand: Rows are laid out by expert.
        buffer_id: The buffer that made it.
    """

    tensors: tuple[Tensor, ...]
    num_experts: int
    num_max_tokens_per_rank: int
    expert_alignment: int
    do_expand: bool
    buffer_id: int

    @property
    def topk_idx(self) -> Tensor:
        """`[num_tokens, num_topk]`: the tensor that was passed."""
        return named_tensor(self.tensors, "topk_idx")

    @property
    def psum_num_recv_tokens_per_expert(self) -> Tensor:
        """`[num_local_experts]` int32, as in `EPHandle`."""
        return named_tensor(self.tensors, "psum_num_recv_tokens_per_expert")

    @property
    def num_unaligned_recv_tokens_per_expert(self) -> Tensor:
        """`[num_local_experts]` int32: real rows of each local expert."""
        return named_tensor(self.tensors, "num_unaligned_recv_tokens_per_expert")

    @property
    def num_recv_tokens_per_expert_list(self) -> list[int]:
        """Aligned rows of each local expert; empty without a CPU sync."""
        return self.to_handle().num_recv_tokens_per_expert_list

    def to_handle(self) -> EPHandle:
        """The same routing as an `EPHandle`, for calls of the buffer itself."""
        return _to_handle(self.tensors, *self._settings)

    @property
    def _settings(self) -> tuple[int, int, int, int, bool]:
        """The numbers that operators take beside the tensors, in their order."""
        return (
            self.buffer_id,
            self.num_experts,
            self.num_max_tokens_per_rank,
            self.expert_alignment,
            self.do_expand,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dispatched:
    """What `dispatch` gives.

    Attributes:
        recv_x: `[num_recv_tokens, hidden]`, or `[num_expanded_tokens, hidden]` expert-major.
        recv_topk_idx: `[num_recv_tokens, num_topk]` local expert or -1; None expert-major.
        recv_topk_weights: `[num_recv_tokens, num_topk]`, 0 where the expert is not local; `[num_expanded_tokens]`
            expert-major; None without weights.
        handle: The routing, for `combine`.
    """

    recv_x: Tensor
    recv_topk_idx: Tensor | None
    recv_topk_weights: Tensor | None
    handle: Routing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Combined:
    """What `combine` gives.

    Attributes:
        x: `[num_tokens, hidden]`.
        topk_weights: `[num_tokens, num_topk]`, or None without weights.
    """

    x: Tensor
    topk_weights: Tensor | None


def dispatch(
    buffer: ElasticBuffer,
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None = None,
    *,
    num_experts: int,
    num_max_tokens_per_rank: int | None = None,
    expert_alignment: int = 1,
    do_expand: bool = False,
    do_cpu_sync: bool = True,
) -> Dispatched:
    """`ElasticBuffer.dispatch` with gradients for `x` and `topk_weights`.

    Unlike there, received weights are 0 where the expert is not local, since those entries have no gradient, and every
    row that no token stands behind is 0.

    Args:
        buffer: The buffer to use.
        x: `[num_tokens, hidden]`, bfloat16, float16, float32 or float64.
        topk_idx: `[num_tokens, num_topk]` int64 or int32, negative for none. Must not change before the backward pass.
        topk_weights: `[num_tokens, num_topk]` float32, or float64, or None.
        num_experts: Experts of all ranks.
        num_max_tokens_per_rank: M; None takes the buffer's.
        expert_alignment: Each expert's rows start at a multiple of this.
        do_expand: Lay rows out by expert.
        do_cpu_sync: Exact sizes; False sizes for the worst case, which compiles without a graph break.

    Raises:
        ConfigError, RankMismatchError, CommTimeoutError: As `ElasticBuffer.dispatch`; also for an expert-major
            dispatch with weights on a buffer without `allow_multiple_reduction`, which could not bring their
            gradients back.

    Collective: yes, and so is its backward pass, which every rank must run. Stream: results are ready for the current
    stream.
    """
    if do_expand and topk_weights is not None and not buffer.allow_multiple_reduction:
        raise ConfigError(
            "an expert-major differentiable dispatch with topk_weights needs a buffer with "
            f"allow_multiple_reduction=True (got False, on rank {buffer.rank_idx}); gradients of the weights could not "
            "come back otherwise"
        )
    max_tokens = buffer.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
    topk_idx = topk_idx.contiguous()
    if topk_weights is not None:
        topk_weights = topk_weights.contiguous()
    settings = (buffer.id, num_experts, max_tokens, expert_alignment, do_expand)
    recv_x, recv_topk_idx, recv_topk_weights, routing = torch.ops.deep_ep_ep.dispatch(
        x.contiguous(), topk_idx, topk_weights, *settings, do_cpu_sync
    )
    return Dispatched(
        recv_x=recv_x,
        recv_topk_idx=None if do_expand else recv_topk_idx,
        recv_topk_weights=None if topk_weights is None else recv_topk_weights,
        handle=Routing(
            tensors=(topk_idx, *routing),
            num_experts=num_experts,
            num_max_tokens_per_rank=max_tokens,
            expert_alignment=expert_alignment,
            do_expand=do_expand,
            buffer_id=buffer.id,
        ),
    )


def combine(
    buffer: ElasticBuffer,
    x: Tensor,
    handle: Routing,
    topk_weights: Tensor | None = None,
    bias: Tensor | None = None,
) -> Combined:
    """`ElasticBuffer.combine` with gradients for `x`, `topk_weights` and `bias`.

    Args:
        buffer: The buffer of the dispatch.
        x: One row for each row that the dispatch returned, `[num_rows, hidden]`.
        handle: `handle` of what `dispatch` returned.
        topk_weights: `[num_rows, num_topk]`, or `[num_rows]` expert-major; or None.
        bias: `[num_tokens, hidden]` of the dtype of `x`, or None.

    Raises:
        ConfigError, RankMismatchError, CommTimeoutError: As `ElasticBuffer.combine`.

    Collective: yes, and so is its backward pass. Stream: results are ready for the current stream.
    """
    if handle.buffer_id != buffer.id:
        raise ConfigError(
            f"handle must come from a dispatch of this buffer (got one of another, on rank {buffer.rank_idx}); "
            "use the buffer that made it"
        )
    combined_x, combined_weights = torch.ops.deep_ep_ep.combine(
        x.contiguous(),
        None if topk_weights is None else topk_weights.contiguous(),
        None if bias is None else bias.contiguous(),
        list(handle.tensors),
        *handle._settings,
    )
    return Combined(x=combined_x, topk_weights=None if topk_weights is None else combined_weights)


# Handles as tensors


def _to_handle(
    routing: Sequence[Tensor],
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
) -> EPHandle:
    """The handle of a routing, whose buffer must be alive."""
    live_buffer(buffer_id)
    return handle_from_tensors(
        routing,
        buffer_id=buffer_id,
        num_experts=num_experts,
        num_max_tokens_per_rank=num_max_tokens_per_rank,
        expert_alignment=expert_alignment,
        do_expand=do_expand,
    )


def _rows_without_token(handle: EPHandle, num_rows: int) -> Tensor | None:
    """`[num_rows]` bool: rows past the real ones, or past the last expert's padding; None where there are none."""
    if handle.was_cpu_synced:
        return None
    if handle.do_expand:
        end = align_up_tensor(handle.num_unaligned_recv_tokens_per_expert.long(), handle.expert_alignment).sum()
    else:
        end = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
    return torch.arange(num_rows, device=end.device) >= end


def _clear(is_cleared: Tensor | None, tensor: Tensor | None, value: int = 0) -> None:
    """Set the marked rows of a tensor."""
    if is_cleared is not None and tensor is not None:
        tensor.masked_fill_(is_cleared.view(-1, *[1] * (tensor.dim() - 1)), value)


# The operators


# Written out because not every torch finds the type of a list among several results by itself. How many tensors there
# are, and of which shapes, is up to the backend's plan.
_DISPATCH_SCHEMA = (
    "(Tensor x, Tensor topk_idx, Tensor? topk_weights, SymInt buffer_id, SymInt num_experts, "
    "SymInt num_max_tokens_per_rank, SymInt expert_alignment, bool do_expand, bool do_cpu_sync) "
    "-> (Tensor, Tensor, Tensor, Tensor[])"
)


@torch.library.custom_op("deep_ep_ep::dispatch", mutates_args=(), schema=_DISPATCH_SCHEMA)
def _dispatch(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
    do_cpu_sync: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    recv_x, recv_topk_idx, recv_weights, handle, _ = live_buffer(buffer_id).dispatch(
        x,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        num_experts=num_experts,
        num_max_tokens_per_rank=num_max_tokens_per_rank,
        expert_alignment=expert_alignment,
        do_handle_copy=False,
        do_cpu_sync=do_cpu_sync,
        do_expand=do_expand,
        do_zero_padding=do_expand,
    )
    assert isinstance(recv_x, Tensor)
    is_past = _rows_without_token(handle, len(recv_x))
    _clear(is_past, recv_x)
    _clear(is_past, recv_topk_idx, -1)
    weights = _masked_weights(recv_weights, recv_topk_idx)
    _clear(is_past, weights)
    if recv_topk_idx is None:
        recv_topk_idx = topk_idx.new_empty(0)
    if weights is None:
        weights = x.new_empty(0, dtype=torch.float32)
    return recv_x, recv_topk_idx, weights, tensors_of_handle(handle)


def _masked_weights(weights: Tensor | None, recv_topk_idx: Tensor | None) -> Tensor | None:
    """Received weights with 0 where the expert is not local; expert-major weights are local all."""
    if weights is None or recv_topk_idx is None:
        return weights
    return weights.masked_fill(recv_topk_idx < 0, 0)


@_dispatch.register_fake
def _(
    x: Tensor,
    topk_idx: Tensor,
    topk_weights: Tensor | None,
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
    do_cpu_sync: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    # A block that was compiled for one buffer and then meets another is traced with symbols for the numbers that
    # changed; the buffer must be one, so each gets its own program.
    buffer = live_buffer(int(buffer_id))
    num_local_experts = num_experts // buffer.num_ranks
    num_topk = topk_idx.size(1)
    new_size: Callable[[], Any] = torch.library.get_ctx().new_dynamic_size
    num_recv: Any = new_size() if do_cpu_sync else max_recv_tokens(buffer.num_ranks, num_max_tokens_per_rank)
    num_rows: Any = num_recv
    if do_expand:
        worst_case = max_expanded_tokens(
            buffer.num_ranks, num_max_tokens_per_rank, num_topk, num_local_experts, expert_alignment
        )
        num_rows = new_size() if do_cpu_sync else worst_case
    weights_shape: tuple[Any, ...] = (num_rows,) if do_expand else (num_rows, num_topk)
    weights_dtype = torch.float32 if topk_weights is None else topk_weights.dtype
    # A closed buffer may be traced with any plan: the call says itself that the buffer is closed.
    plan_type = RoutingPlan if buffer.runtime is None else buffer.runtime.plan_type(x, topk_weights, num_experts)
    routing = new_handle_tensors(
        plan_type,
        topk_idx,
        num_ranks=buffer.num_ranks,
        num_scaleup_ranks=buffer.num_scaleup_ranks,
        num_local_experts=num_local_experts,
        num_recv=num_recv,
        do_expand=do_expand,
        new_size=new_size,
    )
    return (
        x.new_empty(num_rows, x.size(1)),
        topk_idx.new_empty((0,) if do_expand else (num_recv, num_topk)),
        x.new_empty((0,) if topk_weights is None else weights_shape, dtype=weights_dtype),
        routing,
    )


@torch.library.custom_op("deep_ep_ep::dispatch_cached", mutates_args=())
def _dispatch_cached(
    x: Tensor,
    topk_weights: Tensor | None,
    routing: Sequence[Tensor],
    num_rows: int,
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
) -> tuple[Tensor, Tensor]:
    handle = _to_handle(routing, buffer_id, num_experts, num_max_tokens_per_rank, expert_alignment, do_expand)
    recv_x, recv_topk_idx, recv_weights, _, _ = live_buffer(buffer_id).dispatch(
        x, topk_weights=topk_weights, handle=handle, do_expand=do_expand, do_zero_padding=do_expand
    )
    # The caller knows the row count; traced programs need it as a number rather than as data.
    assert isinstance(recv_x, Tensor)
    assert len(recv_x) == num_rows, (len(recv_x), num_rows)
    is_past = _rows_without_token(handle, len(recv_x))
    weights = _masked_weights(recv_weights, recv_topk_idx)
    _clear(is_past, recv_x)
    _clear(is_past, weights)
    return recv_x, x.new_empty(0, dtype=torch.float32) if weights is None else weights


@_dispatch_cached.register_fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    routing: Sequence[Tensor],
    num_rows: int,
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
) -> tuple[Tensor, Tensor]:
    if topk_weights is None:
        return x.new_empty(num_rows, x.size(1)), x.new_empty(0, dtype=torch.float32)
    shape = (num_rows,) if do_expand else (num_rows, routing[0].size(1))
    return x.new_empty(num_rows, x.size(1)), topk_weights.new_empty(shape)


@torch.library.custom_op("deep_ep_ep::combine", mutates_args=())
def _combine(
    x: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    routing: Sequence[Tensor],
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
) -> tuple[Tensor, Tensor]:
    handle = _to_handle(routing, buffer_id, num_experts, num_max_tokens_per_rank, expert_alignment, do_expand)
    combined_x, combined_weights, _ = live_buffer(buffer_id).combine(x, handle, topk_weights=topk_weights, bias=bias)
    if combined_weights is None:
        combined_weights = x.new_empty(0, dtype=torch.float32)
    return combined_x, combined_weights


@_combine.register_fake
def _(
    x: Tensor,
    topk_weights: Tensor | None,
    bias: Tensor | None,
    routing: Sequence[Tensor],
    buffer_id: int,
    num_experts: int,
    num_max_tokens_per_rank: int,
    expert_alignment: int,
    do_expand: bool,
) -> tuple[Tensor, Tensor]:
    topk_idx = routing[0]
    combined_x = x.new_empty(topk_idx.size(0), x.size(1))
    if topk_weights is None:
        return combined_x, x.new_empty(0, dtype=torch.float32)
    return combined_x, topk_weights.new_empty(topk_idx.shape)


# Gradients


def _remember(
    ctx: Any, results: tuple[Tensor, Tensor | None], routing: Sequence[Tensor], settings: Sequence[Any]
) -> None:
    """Keep what every backward pass needs: what its incoming gradients look like, and the routing."""
    ctx.like = [None if result is None else (result.shape, result.dtype, result.device) for result in results]
    ctx.settings = settings
    ctx.num_routing = len(routing)
    ctx.save_for_backward(*routing)


def _incoming(ctx: Any, grads: tuple[Tensor | None, Tensor | None]) -> list[Any]:
    """The gradients of rows and weights, contiguous; None where the forward pass had no weights.

    A rank may have no use for a result that others use; it must still take part, with zeros.
    """
    incoming: list[Any] = []
    for grad, like in zip(grads, ctx.like, strict=True):
        if like is not None and grad is None:
            shape, dtype, device = like
            incoming.append(torch.zeros(shape, dtype=dtype, device=device))
        else:
            incoming.append(None if like is None or grad is None else grad.contiguous())
    return incoming


def _combine_grads(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The backward pass of either dispatch: rows and weights go back to their tokens."""
    rows, weights = _incoming(ctx, (grads[0], grads[1]))
    back_x, back_weights = torch.ops.deep_ep_ep.combine(rows, weights, None, list(ctx.saved_tensors), *ctx.settings)
    return back_x, None if weights is None else back_weights


def _set_up_dispatch(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]
) -> None:
    _, topk_idx, topk_weights, *settings, _ = inputs
    recv_x, _, recv_weights, routing = output
    _remember(ctx, (recv_x, None if topk_weights is None else recv_weights), (topk_idx, *routing), settings)


def _back_dispatch(ctx: Any, grad_x: Tensor | None, _: Any, grad_weights: Tensor | None, __: Any) -> tuple[Any, ...]:
    back_x, back_weights = _combine_grads(ctx, grad_x, grad_weights)
    return back_x, None, back_weights, *[None] * (len(ctx.settings) + 1)


def _set_up_cached(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, topk_weights, routing, _, *settings = inputs
    _remember(ctx, (output[0], None if topk_weights is None else output[1]), routing, settings)


def _back_cached(ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None) -> tuple[Any, ...]:
    back_x, back_weights = _combine_grads(ctx, grad_x, grad_weights)
    return back_x, back_weights, [None] * ctx.num_routing, *[None] * (len(ctx.settings) + 1)


def _set_up_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, topk_weights, bias, routing, *settings = inputs
    ctx.num_rows = x.size(0)
    ctx.has_bias = bias is not None
    _remember(ctx, (output[0], None if topk_weights is None else output[1]), routing, settings)


def _back_combine(ctx: Any, grad_x: Tensor | None, grad_weights: Tensor | None) -> tuple[Any, ...]:
    rows, weights = _incoming(ctx, (grad_x, grad_weights))
    sent_x, sent_weights = torch.ops.deep_ep_ep.dispatch_cached(
        rows, weights, list(ctx.saved_tensors), ctx.num_rows, *ctx.settings
    )
    return (
        sent_x,
        None if weights is None else sent_weights,
        rows if ctx.has_bias else None,
        [None] * ctx.num_routing,
        *[None] * len(ctx.settings),
    )


_dispatch.register_autograd(_back_dispatch, setup_context=_set_up_dispatch)
_dispatch_cached.register_autograd(_back_cached, setup_context=_set_up_cached)
_combine.register_autograd(_back_combine, setup_context=_set_up_combine)
