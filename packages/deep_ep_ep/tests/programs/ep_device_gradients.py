"""Gradients on the device backend: equal to the collective backend's to the bit, compiled and in a CUDA graph too.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 ep_device_gradients.py [check ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import ep_gradients
import torch
import torch.distributed as dist
from ep_cases import SETTING, assert_values_equal
from ep_device_setting import RECV_MEMORIES, on_device
from torch import Tensor

from deep_ep_core.local import run_as_script
from deep_ep_ep import ElasticBuffer, autograd
from deep_ep_ep.device.plan import DevicePlan
from deep_ep_ep.handle import RoutingPlan

HIDDEN = 64
NUM_TOPK = 4
MAX_TOKENS = 40
NUM_TOKENS = (17, 0, 40, 1)
NUM_LOCAL_EXPERTS = 4
EXPERT_ALIGNMENT = 8
LAYOUTS = [(do_expand, do_cpu_sync) for do_expand in (False, True) for do_cpu_sync in (True, False)]


@dataclass(frozen=True)
class Batch:
    """The tokens of one rank; leaves of the graph, but for `topk_idx`."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor | None
    bias: Tensor | None

    @classmethod
    def make(cls, dtype: torch.dtype, *, seed: int = 0, has_weights: bool = True, has_bias: bool = True) -> Batch:
        rank, num_experts = dist.get_rank(), NUM_LOCAL_EXPERTS * dist.get_world_size()
        num_tokens = NUM_TOKENS[rank % len(NUM_TOKENS)]
        generator = torch.Generator().manual_seed(seed * 1000 + rank)
        topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :NUM_TOPK].contiguous()
        topk_idx[torch.rand(topk_idx.shape, generator=generator) < 0.2] = -1
        weights_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        weights = torch.rand(topk_idx.shape, generator=generator, dtype=weights_dtype)
        x, bias = (torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype) for _ in range(2))

        def leaf(values: Tensor) -> Tensor:
            return values.to(SETTING.device).requires_grad_()

        return cls(
            x=leaf(x),
            topk_idx=topk_idx.to(SETTING.device),
            topk_weights=leaf(weights) if has_weights else None,
            bias=leaf(bias) if has_bias else None,
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.x, self.topk_weights, self.bias) if leaf is not None]

    @torch.no_grad()
    def take_over(self, other: Batch) -> None:
        """The values of another batch, in the memory of this one."""
        for each in fields(self):
            getattr(self, each.name).copy_(getattr(other, each.name))


def open_buffer(backend: str, **options: object) -> ElasticBuffer:
    if SETTING.device == "cpu":
        backend = "collective"
    arguments = {"num_bytes": 64 << 20, "num_cpu_timeout_secs": 60, **SETTING.options, **options, "backend": backend}
    buffer = ElasticBuffer(None, num_max_tokens_per_rank=MAX_TOKENS, **arguments)  # type: ignore[arg-type]
    assert buffer.runtime is not None
    assert buffer.runtime.name == backend
    return buffer


def run_forward(
    buffer: ElasticBuffer, batch: Batch, *, do_expand: bool, do_cpu_sync: bool
) -> tuple[Tensor, Tensor | None, autograd.Dispatched]:
    """Dispatch, something unlike the identity, and combine with all that it takes."""
    sent = autograd.dispatch(
        buffer,
        batch.x,
        batch.topk_idx,
        batch.topk_weights,
        num_experts=NUM_LOCAL_EXPERTS * buffer.num_ranks,
        expert_alignment=EXPERT_ALIGNMENT,
        do_expand=do_expand,
        do_cpu_sync=do_cpu_sync,
    )
    outputs, weights = torch.sin(sent.recv_x), sent.recv_topk_weights
    if weights is not None:
        scale = weights if do_expand else weights.sum(1)
        outputs = outputs * (1 + scale.unsqueeze(1)).to(outputs.dtype)
        weights = weights * 3
    back = autograd.combine(buffer, outputs, sent.handle, topk_weights=weights, bias=batch.bias)
    return back.x, back.topk_weights, sent


def gradients(batch: Batch, out: Tensor, out_weights: Tensor | None, *, is_twice: bool) -> dict[str, Tensor]:
    """Gradients by all leaves, each element of the results with a factor of its own; and gradients of those."""
    factors = torch.linspace(0.5, 2.0, out.numel(), device=out.device, dtype=torch.float32).view_as(out)
    loss = (out * factors).sum()
    if out_weights is not None:
        loss = loss + (out_weights**2 * factors[:, :NUM_TOPK]).sum()
    grads = torch.autograd.grad(loss, batch.leaves, create_graph=is_twice)
    found = {f"gradient {place}": grad.detach() for place, grad in enumerate(grads)}
    if is_twice:
        inner = [leaf for leaf in (batch.x, batch.topk_weights) if leaf is not None]
        total = sum((grad.to(loss.dtype) ** 2).sum() for grad in grads)
        second = torch.autograd.grad(total, inner)
        found |= {f"second gradient {place}": grad for place, grad in enumerate(second)}
    return found


def run_step(
    buffer: ElasticBuffer, batch: Batch, *, do_expand: bool, do_cpu_sync: bool, is_twice: bool = False
) -> dict[str, Tensor]:
    """All results of a forward and a backward pass, by name."""
    out, out_weights, sent = run_forward(buffer, batch, do_expand=do_expand, do_cpu_sync=do_cpu_sync)
    results = {"recv_x": sent.recv_x.detach(), "out": out.detach()}
    for name, value in (
        ("recv_topk_idx", sent.recv_topk_idx),
        ("recv_topk_weights", sent.recv_topk_weights),
        ("out_weights", out_weights),
    ):
        if value is not None:
            results[name] = value.detach()
    return results | gradients(batch, out, out_weights, is_twice=is_twice)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_values_equal(actual[name], value.cpu(), f"{name}, {what}")
    if dist.get_rank() == 0:
        assert all(expected[name].abs().sum() > 0 for name in expected if "gradient" in name), what


def check_gradients(dtype: torch.dtype, recv_memory: str) -> int:
    """Both layouts and both kinds of sizes, with and without weights and bias."""
    num_checked = 0
    with on_device(recv_memory):
        collective, device = open_buffer("collective"), open_buffer("device")
        for do_expand, do_cpu_sync in LAYOUTS:
            for has_weights, has_bias in ((True, True), (False, False)):
                batch = Batch.make(dtype, has_weights=has_weights, has_bias=has_bias)
                modes = {"do_expand": do_expand, "do_cpu_sync": do_cpu_sync, "is_twice": has_weights}
                expected, actual = run_step(collective, batch, **modes), run_step(device, batch, **modes)
                assert_same(actual, expected, f"{modes}, bias={has_bias}")
                num_checked += 1
    return num_checked


def check_plans(recv_memory: str) -> None:
    """A handle that went through the operators is as the kernel made it; calls that kernels do not take fall back."""
    with on_device(recv_memory):
        buffer = open_buffer("device")
        for do_expand, do_cpu_sync in LAYOUTS:
            sent = run_forward(buffer, Batch.make(torch.bfloat16), do_expand=do_expand, do_cpu_sync=do_cpu_sync)[2]
            handle = sent.handle.to_handle()
            assert isinstance(handle.plan, DevicePlan)
            assert handle.plan.has_row_order(handle.recv_src_metadata)
            rows = len(sent.recv_x)
            assert rows == (handle.num_expanded_tokens if do_expand else handle.num_recv_tokens)
            wide = run_forward(buffer, Batch.make(torch.float64), do_expand=do_expand, do_cpu_sync=do_cpu_sync)[2]
            assert isinstance(wide.handle.to_handle().plan, RoutingPlan)


def check_fallback(recv_memory: str) -> None:
    """Float64 weights go by the collective backend, compiled or not, forward and backward."""
    with on_device(recv_memory):
        collective, device = open_buffer("collective"), open_buffer("device")
        batch = Batch.make(torch.float64)
        for do_expand, do_cpu_sync in LAYOUTS:
            modes = {"do_expand": do_expand, "do_cpu_sync": do_cpu_sync}
            expected = run_step(collective, batch, **modes)
            assert_same(run_step(device, batch, **modes), expected, f"{modes}")
            check_compiled_step(device, batch, expected, **modes)


def check_compiled(dtype: torch.dtype, recv_memory: str) -> None:
    """Whole with worst-case sizes; with exact sizes in pieces, and whole where torch may capture dynamic shapes."""
    with on_device(recv_memory):
        collective, device = open_buffer("collective"), open_buffer("device")
        batch = Batch.make(dtype)
        for do_expand, do_cpu_sync in LAYOUTS:
            modes = {"do_expand": do_expand, "do_cpu_sync": do_cpu_sync}
            expected = run_step(collective, batch, **modes)
            check_compiled_step(device, batch, expected, **modes)
            if do_cpu_sync:
                with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                    check_compiled_step(device, batch, expected, is_whole=True, **modes)


def check_compiled_step(
    buffer: ElasticBuffer,
    batch: Batch,
    expected: dict[str, Tensor],
    *,
    do_expand: bool,
    do_cpu_sync: bool,
    is_whole: bool | None = None,
) -> None:
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=not do_cpu_sync if is_whole is None else is_whole)
    def block(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        own = Batch(x=x, topk_idx=topk_idx, topk_weights=topk_weights, bias=bias)
        return run_forward(buffer, own, do_expand=do_expand, do_cpu_sync=do_cpu_sync)[:2]

    # Compiled for one batch, then used with it.
    for _ in range(2):
        out, out_weights = block(batch.x, batch.topk_idx, batch.topk_weights, batch.bias)
        actual = {"out": out.detach(), "out_weights": out_weights.detach()}
        actual |= gradients(batch, out, out_weights, is_twice=False)
        assert_same(actual, {name: expected[name] for name in actual}, f"compiled, expand={do_expand}")


def check_compiled_block(recv_memory: str) -> None:
    """The block of `ep_gradients`, with a router and experts."""
    with on_device(recv_memory):
        ep_gradients.check_compiled_variants()


def check_graph(dtype: torch.dtype, recv_memory: str, num_replays: int = 3) -> None:
    """One graph of a forward and a backward pass without CPU sync gives what each replay's own tokens ask for."""
    with on_device(recv_memory):
        collective, device = open_buffer("collective"), open_buffer("device")
        for do_expand in (False, True):
            modes = {"do_expand": do_expand, "do_cpu_sync": False}
            batch = Batch.make(dtype)
            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                for _ in range(2):
                    run_step(device, batch, **modes)
            torch.cuda.current_stream().wait_stream(warm_up)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = run_step(device, batch, **modes)
            for seed in range(1, 1 + num_replays):
                other = Batch.make(dtype, seed=seed)
                batch.take_over(other)
                graph.replay()
                assert_same(results, run_step(collective, other, **modes), f"graph, {modes}, seed={seed}")


CHECKS: dict[str, tuple[Callable[..., object], tuple[tuple[object, ...], ...]]] = {
    "gradients": (check_gradients, ((torch.bfloat16,), (torch.float32,))),
    "plans": (check_plans, ((),)),
    "graph": (check_graph, ((torch.bfloat16,), (torch.float32,))),
    "compiled": (check_compiled, ((torch.float32,),)),
    "compiled-block": (check_compiled_block, ((),)),
    "fallback": (check_fallback, ((),)),
}


def timed(name: str, arguments: tuple[object, ...], recv_memory: str) -> Callable[[], None]:
    def run() -> None:
        begin = time.monotonic()
        CHECKS[name][0](*arguments, recv_memory)
        if dist.get_rank() == 0:
            words = " ".join(map(str, (name, *arguments, recv_memory)))
            print(f"right: {words}, {time.monotonic() - begin:.1f} s", flush=True)

    return run


if __name__ == "__main__":
    run_as_script(
        *[
            timed(name, arguments, recv_memory)
            for name in sys.argv[1:] or CHECKS
            for recv_memory in (RECV_MEMORIES if name in ("gradients", "graph") else ("auto",))
            for arguments in CHECKS[name][1]
        ]
    )
