"""The calls that frameworks make, in their own words: names, positions and values as in their sources."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import deep_ep_ep
from deep_ep_ep import ElasticBuffer, EPHandle, EventHandle, EventOverlap
from deep_ep_ep.quant import cast_from_fp8, cast_to_fp8

NUM_EXPERTS = 8
NUM_TOPK = 2
HIDDEN = 256
MAX_TOKENS = 16


class Problem:
    """One batch of this rank; each token is taken up by every expert it names, whose output is its input."""

    def __init__(self) -> None:
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        generator = torch.Generator().manual_seed(rank)
        num_tokens = 5 + 4 * rank
        self.num_local_experts = NUM_EXPERTS // num_ranks
        self.topk_idx = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(1)[:, :NUM_TOPK].contiguous()
        self.topk_idx[0, 1] = -1
        self.topk_weights = torch.rand(num_tokens, NUM_TOPK, generator=generator)
        # Small integers: sums of them are exact in bfloat16.
        self.x = torch.randint(-32, 33, (num_tokens, HIDDEN), generator=generator).to(torch.bfloat16)

    @property
    def num_ranks_of_token(self) -> torch.Tensor:
        ranks = [{e // self.num_local_experts for e in experts if e >= 0} for experts in self.topk_idx.tolist()]
        return torch.tensor([[len(each)] for each in ranks])

    @property
    def num_experts_of_token(self) -> torch.Tensor:
        return (self.topk_idx >= 0).sum(1, keepdim=True)

    def check_token_major(self, combined: torch.Tensor) -> None:
        """What comes back when each rank returns what it received."""
        assert torch.equal(combined, self.x * self.num_ranks_of_token)

    def check_expert_major(self, combined: torch.Tensor) -> None:
        assert torch.equal(combined, self.x * self.num_experts_of_token)


def call_as_vllm() -> None:
    """Prefill with exact sizes by expert, and decoding in a CUDA graph, by token."""
    p = Problem()
    buffer = ElasticBuffer(
        group=dist.group.WORLD,
        num_max_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_topk=NUM_TOPK,
        use_fp8_dispatch=True,
        allow_hybrid_mode=False,
        prefer_overlap_with_compute=True,
        allow_multiple_reduction=True,
        num_cpu_timeout_secs=1800,
        num_gpu_timeout_secs=1800,
        explicitly_destroy=True,
    )
    assert buffer.get_theoretical_num_sms(num_experts=NUM_EXPERTS, num_topk=NUM_TOPK) >= 4
    for cudagraph in (False, True):
        x_q, x_scales = cast_to_fp8(p.x)
        recv, recv_topk_idx, recv_topk_weights, handle, event = buffer.dispatch(
            x=(x_q, x_scales),
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            num_max_tokens_per_rank=MAX_TOKENS if cudagraph else None,
            do_expand=not cudagraph,
            do_cpu_sync=not cudagraph,
            async_with_compute_stream=False,
        )
        assert isinstance(handle, EPHandle)
        assert event.event is None
        rows = cast_from_fp8(*recv)
        if cudagraph:
            assert handle.num_recv_tokens_per_expert_list == []
            num_recv = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
            assert recv_topk_idx.shape == recv_topk_weights.shape == (2 * MAX_TOKENS, NUM_TOPK)
            assert bool((recv_topk_idx[:num_recv] >= 0).any(1).all())
        else:
            assert recv_topk_idx is None
            assert recv_topk_weights.shape == (len(rows),)
            assert len(handle.num_recv_tokens_per_expert_list) == p.num_local_experts
            assert sum(handle.num_recv_tokens_per_expert_list) == len(rows)
        for run_async in (False, True):
            combined, _, event = buffer.combine(
                x=rows,
                handle=handle,
                topk_weights=None,
                async_with_compute_stream=run_async,
                allocate_on_comm_stream=run_async,
            )
            if event.event is not None:
                event.current_stream_wait()
            returned = cast_from_fp8(x_q, x_scales)
            factor = p.num_ranks_of_token if cudagraph else p.num_experts_of_token
            # At most two terms, both the same: doubling is exact.
            assert torch.equal(combined, returned * factor)
    buffer.destroy()


def call_as_sglang() -> None:
    """Prefill and masked decoding."""
    os.environ.setdefault("EP_REUSE_NCCL_COMM", "0")
    p = Problem()
    buffer = ElasticBuffer(
        dist.group.WORLD,
        num_max_tokens_per_rank=MAX_TOKENS,
        hidden=HIDDEN,
        num_topk=NUM_TOPK,
        use_fp8_dispatch=False,
        allow_hybrid_mode=True,
        sl_idx=0,
        prefer_overlap_with_compute=False,
    )
    assert buffer.num_bytes > 0
    num_sms = buffer.get_theoretical_num_sms(NUM_EXPERTS, NUM_TOPK)
    num_qps = buffer.get_theoretical_num_qps(num_sms)
    for is_decode in (False, True):
        x = cast_to_fp8(p.x, group_size=128) if not is_decode else p.x
        recv, _, recv_weights, handle, _ = buffer.dispatch(
            x,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            num_max_tokens_per_rank=MAX_TOKENS,
            expert_alignment=1 if is_decode else 128,
            num_sms=num_sms,
            num_qps=num_qps,
            use_tma_aligned_col_major_sf=not is_decode,
            do_cpu_sync=not is_decode,
            do_expand=is_decode,
        )
        num_recv = handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()
        assert 0 < num_recv <= 2 * MAX_TOKENS
        assert len(handle.psum_num_recv_tokens_per_expert) == p.num_local_experts
        if is_decode:
            assert handle.num_recv_tokens_per_expert_list == []
            rows = recv
        else:
            assert all(count % 128 == 0 for count in handle.num_recv_tokens_per_expert_list)
            assert recv[1].stride() == (1, (num_recv + 3) // 4 * 4)
            rows = cast_from_fp8(*recv)
        combined, weights, _ = buffer.combine(
            rows, handle=handle, topk_weights=recv_weights, num_sms=num_sms, num_qps=num_qps
        )
        assert torch.equal(weights, p.topk_weights.masked_fill(p.topk_idx < 0, 0))
        if is_decode:
            p.check_expert_major(combined)
        else:
            assert torch.equal(combined, cast_from_fp8(*x) * p.num_ranks_of_token)


class _TitanDispatch(torch.autograd.Function):
    """torchtitan's way to differentiate: the backward of a dispatch is a combine, with the gradients of the scores."""

    @staticmethod
    def forward(ctx, x, topk_idx, scores, buffer):
        recv_x, _, recv_scores, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=scores, num_experts=NUM_EXPERTS, do_expand=False, do_cpu_sync=True
        )
        ctx.buffer, ctx.saved_handle = buffer, handle
        ctx.set_materialize_grads(True)
        return recv_x, recv_scores, handle

    @staticmethod
    def backward(ctx, grad_x, grad_scores, _):
        back_x, back_scores, _ = ctx.buffer.combine(
            grad_x.contiguous(), handle=ctx.saved_handle, topk_weights=grad_scores.float()
        )
        return back_x, None, back_scores, None


class _TitanCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, buffer, handle):
        ctx.buffer, ctx.saved_handle = buffer, handle
        combined, _, _ = buffer.combine(x, handle=handle)
        return combined

    @staticmethod
    def backward(ctx, grad):
        h = ctx.saved_handle
        grad_x, _, _, _, _ = ctx.buffer.dispatch(grad.contiguous(), handle=h, num_sms=h.num_sms, do_cpu_sync=False)
        return grad_x, None, None


def call_as_torchtitan() -> None:
    """Training with autograd functions of its own, and inference by expert."""
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
    assert buffer.num_bytes >= num_bytes
    x, scores = p.x.clone().requires_grad_(), p.topk_weights.clone().requires_grad_()
    recv_x, recv_scores, handle = _TitanDispatch.apply(x, p.topk_idx, scores, buffer)
    combined = _TitanCombine.apply(recv_x * 2, buffer, handle)
    p.check_token_major(combined.detach() / 2)
    rank_weight = torch.full_like(recv_scores, dist.get_rank() + 1)
    (combined.sum() + (recv_scores * rank_weight).sum()).backward()
    # d/dx: each of the ranks that a token goes to doubles it.
    assert torch.equal(x.grad, (2 * p.num_ranks_of_token).expand_as(x).to(torch.bfloat16))
    # d/dscore: the gradient comes from the rank that hosts the expert, which weighs its scores by its rank.
    host = torch.where(p.topk_idx >= 0, p.topk_idx // p.num_local_experts, -1)
    assert torch.equal(scores.grad, (host + 1).float())

    with torch.inference_mode():
        recv_x, _, recv_scores, handle, _ = buffer.dispatch(
            p.x,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            do_expand=True,
            do_cpu_sync=False,
        )
        combined, _, _ = buffer.combine(recv_x, handle=handle)
        p.check_expert_major(combined)


def call_as_megatron() -> None:
    """An all-reduce first, a buffer sized by the hint, events between the calls; backward by the opposite calls."""
    p = Problem()
    group = dist.group.WORLD
    dist.all_reduce(torch.zeros(1), group=group)
    num_bytes = ElasticBuffer.get_buffer_size_hint(group, MAX_TOKENS, HIDDEN, NUM_TOPK)
    buffer = ElasticBuffer(group, num_bytes=num_bytes, num_max_tokens_per_rank=MAX_TOKENS)
    assert (buffer.group, buffer.num_bytes) == (group, num_bytes)
    num_sms = 20
    for async_finish in (False, True):
        streams = {"async_with_compute_stream": async_finish, "allocate_on_comm_stream": async_finish}
        event = EventOverlap(EventHandle()) if async_finish else None
        recv_x, recv_idx, recv_probs, handle, after = buffer.dispatch(
            p.x,
            topk_idx=p.topk_idx,
            topk_weights=p.topk_weights,
            num_experts=NUM_EXPERTS,
            expert_alignment=1,
            num_sms=num_sms,
            previous_event=event,
            **streams,
        )
        if async_finish:
            after.current_stream_wait()
        tokens_per_expert = torch.tensor(handle.num_recv_tokens_per_expert_list)
        # As indices to a multihot map: how many rows name each local expert.
        assert torch.equal(tokens_per_expert, torch.bincount(recv_idx[recv_idx >= 0], minlength=p.num_local_experts))
        assert recv_probs.dtype == torch.float32

        combined, _, after = buffer.combine(
            recv_x, handle=handle, previous_event=buffer.capture() if async_finish else None, **streams
        )
        if async_finish:
            after.current_stream_wait()
        p.check_token_major(combined)

        # Backward of the combine, then of the dispatch.
        grad_recv, _, _, same_handle, after = buffer.dispatch(
            combined.contiguous(), handle=handle, previous_event=event, **streams
        )
        assert same_handle is handle
        if async_finish:
            after.current_stream_wait()
        grad_x, grad_probs, after = buffer.combine(
            grad_recv.contiguous(), handle, topk_weights=recv_probs.float(), previous_event=event, **streams
        )
        if async_finish:
            after.current_stream_wait()
        assert torch.equal(grad_x, combined * p.num_ranks_of_token)
        assert torch.equal(grad_probs, p.topk_weights.masked_fill(p.topk_idx < 0, 0))
    # Regrown when a larger one is needed.
    larger = ElasticBuffer.get_buffer_size_hint(group, 256 * MAX_TOKENS, HIDDEN, NUM_TOPK)
    assert larger > buffer.num_bytes
    assert ElasticBuffer(group, num_bytes=larger).num_bytes == larger


def call_with_everything_by_position() -> None:
    """Positions count too: the arguments of every call in their order, with numbers for booleans."""
    p = Problem()
    assert deep_ep_ep.topk_idx_t == torch.int64
    num_bytes = ElasticBuffer.get_buffer_size_hint(dist.group.WORLD, MAX_TOKENS, HIDDEN, NUM_TOPK, 0, 1, 1)
    buffer = ElasticBuffer(
        dist.group.WORLD, num_bytes, 0, MAX_TOKENS, HIDDEN, NUM_TOPK, 0, 0, 1, 1, 1, 3, 0, 300, 100, 1
    )
    num_sms = buffer.get_theoretical_num_sms(NUM_EXPERTS, NUM_TOPK, 0, 50, 430, 200, 50)
    num_qps = buffer.get_theoretical_num_qps(num_sms)
    stats = torch.zeros(p.num_local_experts, dtype=torch.int32)
    recv_x, _, recv_weights, handle, _ = buffer.dispatch(
        p.x,
        p.topk_idx.to(deep_ep_ep.topk_idx_t),
        p.topk_weights,
        stats,
        NUM_EXPERTS,
        MAX_TOKENS,
        4,
        num_sms,
        num_qps,
        buffer.capture(),
        None,
        0,
        1,
        None,
        1,
        1,
        1,
        1,
        1,
    )
    assert stats.tolist() == handle.num_unaligned_recv_tokens_per_expert.tolist()
    bias = torch.ones_like(p.x)
    combined, weights, _ = buffer.combine(
        recv_x, handle, recv_weights, (bias, bias), num_sms, num_qps, buffer.capture(), None, 0, 1
    )
    p.check_expert_major(combined - 2)
    assert weights.shape == p.topk_weights.shape
    buffer.barrier(1, 0, 1)
    buffer.destroy()
