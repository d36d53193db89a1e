"""Gradients through dispatch and combine, checked against finite differences and against one process."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from ep_cases import SETTING
from torch import nn

from deep_ep_core.local import run_as_script
from deep_ep_ep import ElasticBuffer, autograd

NUM_TOKENS = 3
HIDDEN = 2
NUM_TOPK = 3


class _Replicated(torch.autograd.Function):
    """A value that all ranks hold; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _Summed(torch.autograd.Function):
    """The sum of a value over all ranks, as one loss."""

    @staticmethod
    def forward(ctx, value):
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad


def make_buffer() -> ElasticBuffer:
    return ElasticBuffer(None, num_bytes=64 << 20, num_max_tokens_per_rank=8, num_cpu_timeout_secs=60)


def check_gradcheck() -> int:
    """Every input of both operators, in both layouts, with exact and with worst-case sizes."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = 2 * num_ranks
    generator = torch.Generator().manual_seed(3)
    shape = (num_ranks, NUM_TOKENS, NUM_TOPK)
    topk_idx = torch.rand(num_ranks, NUM_TOKENS, num_experts, generator=generator).argsort(-1)[..., :NUM_TOPK]
    topk_idx[0, 0, 1] = -1
    topk_idx[-1, 1] = -1
    x = torch.randn(num_ranks, NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(num_ranks, NUM_TOKENS, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    buffer = make_buffer()
    num_checked = 0
    for do_expand in (False, True):
        for do_cpu_sync in (True, False):

            def loss(x, weights, bias, do_expand=do_expand, do_cpu_sync=do_cpu_sync):
                own_x, own_weights, own_bias = (_Replicated.apply(value)[rank] for value in (x, weights, bias))
                sent = autograd.dispatch(
                    buffer,
                    own_x.contiguous(),
                    topk_idx[rank],
                    own_weights.contiguous(),
                    num_experts=num_experts,
                    expert_alignment=2,
                    do_expand=do_expand,
                    do_cpu_sync=do_cpu_sync,
                )
                scale = sent.recv_topk_weights if do_expand else sent.recv_topk_weights.sum(1)
                y = torch.sin(sent.recv_x) * (1 + scale.unsqueeze(1))
                back = autograd.combine(
                    buffer, y, sent.handle, topk_weights=sent.recv_topk_weights * 3, bias=own_bias.contiguous()
                )
                # Unequal factors, so that a gradient in a wrong place shows.
                factors = torch.linspace(0.5, 2.0, back.x.numel(), dtype=torch.float64).view_as(back.x) + rank
                weight_factors = torch.linspace(1.0, 3.0, NUM_TOKENS * NUM_TOPK, dtype=torch.float64)
                return _Summed.apply(
                    (back.x * factors).sum() + (back.topk_weights**2).flatten().dot(weight_factors * (rank + 1))
                )

            assert torch.autograd.gradcheck(loss, (x, weights, bias), fast_mode=False)
            num_checked += 1
    return num_checked


class MoE(nn.Module):
    """A small expert-parallel block; with `buffer=None` all experts are here."""

    def __init__(
        self, num_experts: int, hidden: int, *, rank: int, num_ranks: int, do_cpu_sync: bool, do_expand: bool = False
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.router = nn.Parameter(torch.randn(hidden, num_experts, generator=generator))
        experts = torch.randn(num_experts, hidden, hidden, generator=generator) / hidden**0.5
        per_rank = num_experts // num_ranks
        self.experts = nn.Parameter(experts[rank * per_rank : (rank + 1) * per_rank].clone())
        self.num_experts = num_experts
        self.do_cpu_sync = do_cpu_sync
        self.do_expand = do_expand

    def forward(self, x: torch.Tensor, buffer: ElasticBuffer) -> torch.Tensor:
        scores = (x @ self.router).softmax(-1)
        weights, topk_idx = scores.topk(2)
        sent = autograd.dispatch(
            buffer,
            x,
            topk_idx,
            weights,
            num_experts=self.num_experts,
            do_expand=self.do_expand,
            do_cpu_sync=self.do_cpu_sync,
        )
        if self.do_expand:
            ends = sent.handle.psum_num_recv_tokens_per_expert.unsqueeze(0)
            row = torch.arange(sent.recv_x.size(0), device=ends.device).unsqueeze(1)
            expert = (row >= ends).sum(1).clamp(max=self.experts.size(0) - 1)
            outputs = torch.einsum("nh,eho->neo", sent.recv_x, self.experts).tanh()
            y = outputs.gather(1, expert.view(-1, 1, 1).expand(-1, 1, outputs.size(2))).squeeze(1)
            return autograd.combine(buffer, y * sent.recv_topk_weights.unsqueeze(1), sent.handle).x
        # Dense over the local experts: static shapes, so that it compiles whole.
        one_hot = torch.nn.functional.one_hot(sent.recv_topk_idx.clamp(min=0), self.experts.size(0))
        gate = (one_hot * sent.recv_topk_weights.unsqueeze(-1)).sum(1)
        outputs = torch.einsum("nh,eho->neo", sent.recv_x, self.experts).tanh()
        y = (outputs * gate.unsqueeze(-1)).sum(1)
        return autograd.combine(buffer, y, sent.handle).x


def _run_block(block: nn.Module, module: MoE, buffer: ElasticBuffer) -> list[torch.Tensor]:
    rank = dist.get_rank()
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(rank)).to(SETTING.device).requires_grad_()
    module.zero_grad()
    out = block(x, buffer)
    (out * torch.linspace(0, 1, out.numel(), device=out.device).view_as(out)).sum().backward()
    return [out.detach(), x.grad, module.router.grad.clone(), module.experts.grad.clone()]


def open_block_buffer() -> ElasticBuffer:
    options = {"num_cpu_timeout_secs": 120, **SETTING.options}
    return ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=32, **options)  # type: ignore[arg-type]


def check_compiled_block(
    backend: str = "aot_eager",
    do_cpu_sync: bool = False,
    fullgraph: bool = True,
    do_expand: bool = False,
    open_buffer: Callable[[], ElasticBuffer] = open_block_buffer,
) -> None:
    """A compiled block gives the eager result, gradients included."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    buffer = open_buffer()
    module = MoE(2 * num_ranks, 16, rank=rank, num_ranks=num_ranks, do_cpu_sync=do_cpu_sync, do_expand=do_expand)
    module = module.to(SETTING.device)
    torch._dynamo.reset()
    eager = _run_block(module, module, buffer)
    compiled = _run_block(torch.compile(module, backend=backend, fullgraph=fullgraph), module, buffer)
    for name, expected, actual in zip(("out", "x", "router", "experts"), eager, compiled, strict=True):
        assert expected.abs().sum() > 0, name
        torch.testing.assert_close(
            actual, expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def check_compiled_variants(
    backend: str = "aot_eager", open_buffer: Callable[[], ElasticBuffer] = open_block_buffer
) -> None:
    """Both layouts; worst-case sizes compile whole, exact sizes with a graph break or with captured dynamic shapes."""
    for do_expand in (False, True):
        options = {"do_expand": do_expand, "open_buffer": open_buffer}
        check_compiled_block(backend, do_cpu_sync=False, fullgraph=True, **options)
        check_compiled_block(backend, do_cpu_sync=True, fullgraph=False, **options)
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            check_compiled_block(backend, do_cpu_sync=True, fullgraph=True, **options)


def check_sharded_equals_one_process() -> None:
    """The block over all ranks gives each rank what one process with all experts gives, gradients included."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    solo = dist.new_group([rank], use_local_synchronization=True)
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=8, hidden=32, num_cpu_timeout_secs=60)
    alone = ElasticBuffer(solo, num_max_tokens_per_rank=8, hidden=32, num_cpu_timeout_secs=60)
    sharded = MoE(2 * num_ranks, 16, rank=rank, num_ranks=num_ranks, do_cpu_sync=True)
    whole = MoE(2 * num_ranks, 16, rank=0, num_ranks=1, do_cpu_sync=True)
    out, x_grad, router_grad, expert_grad = _run_block(sharded, sharded, buffer)
    whole_out, whole_x_grad, whole_router_grad, whole_expert_grad = _run_block(whole, whole, alone)
    torch.testing.assert_close(out, whole_out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x_grad, whole_x_grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router_grad, whole_router_grad, rtol=1e-5, atol=1e-6)
    # A rank's experts saw the tokens of every rank; the whole model saw this rank's only.
    dist.all_reduce(whole_expert_grad)
    torch.testing.assert_close(expert_grad, whole_expert_grad[rank * 2 : rank * 2 + 2], rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    run_as_script(check_gradcheck, check_sharded_equals_one_process, check_compiled_variants)
