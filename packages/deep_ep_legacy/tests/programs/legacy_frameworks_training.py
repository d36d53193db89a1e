"""The calls that Megatron-Core and torchtitan make, with their arguments, forward and backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from legacy_frameworks_problem import HIDDEN, MAX_TOKENS, NUM_EXPERTS, NUM_TOPK, Problem, num_rows_of_local_experts

from deep_ep import Buffer, ElasticBuffer
from deep_ep.utils import EventHandle, EventOverlap

_buffer: Buffer | None = None


def get_buffer(group: dist.ProcessGroup, hidden_bytes: int) -> Buffer:
    """The buffer of before, unless the group is another or it is too small."""
    global _buffer
    num_nvl_bytes = num_rdma_bytes = 0
    for config in (Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()), num_rdma_bytes)
    if (
        _buffer is None
        or _buffer.group != group
        or _buffer.num_nvl_bytes < num_nvl_bytes
        or _buffer.num_rdma_bytes < num_rdma_bytes
    ):
        _buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
    return _buffer


def new_event(async_finish: bool) -> EventOverlap | None:
    return EventOverlap(EventHandle()) if async_finish else None


class _MegatronDispatch(torch.autograd.Function):
    """Backward, a combine brings back the gradients of rows and of probabilities."""

    @staticmethod
    def forward(ctx, x, token_indices, token_probs, group, async_finish, allocate_on_comm_stream):
        streams = {"async_finish": async_finish, "allocate_on_comm_stream": allocate_on_comm_stream}
        buffer = get_buffer(group, x.size(1) * max(x.element_size(), 2))
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(
            token_indices, NUM_EXPERTS, previous_event=new_event(async_finish), **streams
        )
        recv_x, recv_indices, recv_probs, per_local_expert, handle, after_event = buffer.dispatch(
            x,
            topk_idx=token_indices,
            topk_weights=token_probs,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            previous_event=event if async_finish else None,
            **streams,
        )
        if async_finish:
            after_event.current_stream_wait()
        ctx.group, ctx.handle, ctx.streams = group, handle, streams
        return recv_x, recv_indices, recv_probs, torch.tensor(per_local_expert), handle

    @staticmethod
    def backward(ctx, grad_x, _indices, grad_probs, _counts, _handle):
        buffer = get_buffer(ctx.group, grad_x.size(1) * max(grad_x.element_size(), 2))
        async_finish = ctx.streams["async_finish"]
        back_x, back_probs, after_event = buffer.combine(
            grad_x.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=new_event(async_finish),
            **ctx.streams,
        )
        if async_finish:
            after_event.current_stream_wait()
        return back_x, None, back_probs, None, None, None


class _MegatronCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, handle, async_finish, allocate_on_comm_stream):
        streams = {"async_finish": async_finish, "allocate_on_comm_stream": allocate_on_comm_stream}
        buffer = get_buffer(group, x.size(1) * max(x.element_size(), 2))
        combined, _, after_event = buffer.combine(x, handle=handle, previous_event=new_event(async_finish), **streams)
        if async_finish:
            after_event.current_stream_wait()
        ctx.group, ctx.handle, ctx.streams = group, handle, streams
        return combined

    @staticmethod
    def backward(ctx, grad):
        buffer = get_buffer(ctx.group, grad.size(1) * max(grad.element_size(), 2))
        async_finish = ctx.streams["async_finish"]
        grad_x, _, _, _, _, after_event = buffer.dispatch(
            grad.contiguous(), handle=ctx.handle, previous_event=new_event(async_finish), **ctx.streams
        )
        if async_finish:
            after_event.current_stream_wait()
        return grad_x, None, None, None, None


def run_experts(p: Problem, rows: torch.Tensor, local_idx: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    """As `Problem.run_by_token`, with a graph."""
    factors = (probs * (p.first_expert + local_idx + 1) * (local_idx >= 0)).sum(1, keepdim=True)
    return (rows.float() * factors).to(torch.bfloat16)


def check_gradients(p: Problem, combined: torch.Tensor, x: torch.Tensor, probs: torch.Tensor) -> None:
    p.check(combined.detach())
    # Alternating signs and sizes, so that channels differ.
    weight = torch.tensor([1.0, -2.0], device=x.device).repeat(HIDDEN // 2)
    (combined.float() * weight).sum().backward()
    assert torch.equal(x.grad.float(), p.factors * weight)
    inner = (p.x.float() * weight).sum(1, keepdim=True)
    assert torch.equal(probs.grad, inner * (p.topk_idx + 1) * p.is_selected)


def call_megatron_v1() -> None:
    """Autograd functions around dispatch and combine; the buffer is kept, and made anew when it is too small."""
    global _buffer
    group = dist.group.WORLD
    Buffer.set_num_sms(20)
    buffers = set()
    for seed, async_finish in enumerate((False, True)):
        p = Problem(seed)
        x, probs = p.x.clone().requires_grad_(), p.topk_weights.clone().requires_grad_()
        recv_x, recv_indices, recv_probs, tokens_per_expert, handle = _MegatronDispatch.apply(
            x, p.topk_idx, probs, group, async_finish, async_finish
        )
        assert recv_probs.dtype == torch.float32
        named = recv_indices[recv_indices >= 0]
        assert torch.equal(tokens_per_expert, torch.bincount(named, minlength=p.num_local_experts).cpu())
        rows = run_experts(p, recv_x, recv_indices, recv_probs)
        combined = _MegatronCombine.apply(rows, group, handle, async_finish, async_finish)
        check_gradients(p, combined, x, probs)
        buffers.add(_buffer)
    assert len(buffers) == 1
    assert get_buffer(group, 1 << 14) not in buffers
    _buffer = None


class _ElasticDispatch(torch.autograd.Function):
    """The backward of a V2 dispatch is a combine, with the gradients of the scores."""

    @staticmethod
    def forward(ctx, x, topk_idx, scores, buffer, options):
        recv_x, recv_idx, recv_scores, handle, event = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=scores, num_experts=NUM_EXPERTS, **options
        )
        if event.event is not None:
            event.current_stream_wait()
        ctx.buffer, ctx.saved_handle = buffer, handle
        ctx.set_materialize_grads(True)
        return recv_x, recv_idx, recv_scores, handle

    @staticmethod
    def backward(ctx, grad_x, _idx, grad_scores, _handle):
        back_x, back_scores, _ = ctx.buffer.combine(
            grad_x.contiguous(), handle=ctx.saved_handle, topk_weights=grad_scores.float()
        )
        return back_x, None, back_scores, None, None


class _ElasticCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, handle, options):
        combined, _, event = buffer.combine(x, handle=handle, **options)
        if event.event is not None:
            event.current_stream_wait()
        ctx.buffer, ctx.saved_handle = buffer, handle
        return combined

    @staticmethod
    def backward(ctx, grad):
        h = ctx.saved_handle
        grad_x, _, _, _, _ = ctx.buffer.dispatch(grad.contiguous(), handle=h, num_sms=h.num_sms, do_cpu_sync=False)
        return grad_x, None, None, None


def train(buffer: ElasticBuffer, p: Problem, dispatch_options: dict, combine_options: dict) -> None:
    x, scores = p.x.clone().requires_grad_(), p.topk_weights.clone().requires_grad_()
    recv_x, recv_idx, recv_scores, handle = _ElasticDispatch.apply(x, p.topk_idx, scores, buffer, dispatch_options)
    assert handle.num_recv_tokens_per_expert_list == num_rows_of_local_experts(Problem())
    rows = run_experts(p, recv_x, recv_idx, recv_scores)
    check_gradients(p, _ElasticCombine.apply(rows, buffer, handle, combine_options), x, scores)


def call_megatron_v2() -> None:
    """An all-reduce first, a buffer sized by the hint, events between the calls."""
    p = Problem()
    group = dist.group.WORLD
    dist.all_reduce(torch.zeros(1), group=group)
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, MAX_TOKENS, HIDDEN, NUM_TOPK)
    buffer = ElasticBuffer(group, num_bytes=num_bytes, num_max_tokens_per_rank=MAX_TOKENS)
    for async_finish in (False, True):
        streams = {"async_with_compute_stream": async_finish, "allocate_on_comm_stream": async_finish}
        previous = {"previous_event": buffer.capture()} if async_finish else {}
        train(buffer, p, {"expert_alignment": 1, "num_sms": 20, **streams, **previous}, {**streams, **previous})


def call_torchtitan() -> None:
    """Training with exact sizes by token, inference with worst-case sizes by expert."""
    p = Problem()
    group = dist.group.WORLD
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, MAX_TOKENS, HIDDEN, num_topk=NUM_TOPK, use_fp8_dispatch=False)
    buffer = ElasticBuffer(
        group,
        num_bytes=num_bytes,
        num_max_tokens_per_rank=MAX_TOKENS,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        explicitly_destroy=True,
    )
    train(buffer, p, {"do_expand": False, "do_cpu_sync": True}, {})
    with torch.inference_mode():
        recv_x, _, recv_scores, handle, _ = buffer.dispatch(
            p.x,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            do_expand=True,
            do_cpu_sync=False,
        )
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        starts = [end - count for end, count in zip(ends, num_rows_of_local_experts(p), strict=True)]
        rows = p.run_by_sorted_rows(recv_x, ends, starts)
        for start, end in zip(starts, ends, strict=True):
            rows[start:end] = (rows[start:end].float() * recv_scores[start:end, None]).to(torch.bfloat16)
        combined, _, _ = buffer.combine(rows, handle=handle)
        p.check(combined)
