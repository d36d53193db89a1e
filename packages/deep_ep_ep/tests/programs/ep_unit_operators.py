"""The operators beneath the differentiable calls: their registration, and gradients that are easy to miss."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass, replace

import ep_gradients
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from deep_ep_core.errors import ConfigError
from deep_ep_core.stream import CommScope
from deep_ep_ep import ElasticBuffer, EPHandle, autograd
from deep_ep_ep.backend import Backend, CombineResult, DispatchResult
from deep_ep_ep.checks import CombineArgs, DispatchArgs
from deep_ep_ep.device.plan import DevicePlan, version_of
from deep_ep_ep.handle import Plan, PlanParts

HIDDEN = 4
NUM_TOPK = 3
MAX_TOKENS = 8
LAYOUTS = [(do_expand, do_cpu_sync) for do_expand in (False, True) for do_cpu_sync in (True, False)]


def open_buffer(group: dist.ProcessGroup | None = None, num_max_tokens_per_rank: int = MAX_TOKENS) -> ElasticBuffer:
    return ElasticBuffer(
        group, num_bytes=64 << 20, num_max_tokens_per_rank=num_max_tokens_per_rank, num_cpu_timeout_secs=60
    )


def own_group() -> dist.ProcessGroup:
    """A group of this rank alone."""
    return dist.new_group([dist.get_rank()], use_local_synchronization=True)


@dataclass(frozen=True)
class Batch:
    """The tokens of one rank; any rank can make those of every rank. Leaves of the graph, in float64."""

    x: Tensor
    topk_idx: Tensor
    topk_weights: Tensor

    @classmethod
    def of_rank(cls, rank: int, num_tokens: int, num_experts: int) -> Batch:
        generator = torch.Generator().manual_seed(rank)
        topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :NUM_TOPK].contiguous()
        topk_idx[:1, 1] = -1
        return cls(
            x=torch.randn(num_tokens, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_(),
            topk_idx=topk_idx,
            topk_weights=torch.rand(num_tokens, NUM_TOPK, generator=generator, dtype=torch.float64).requires_grad_(),
        )


def run_block(
    buffer: ElasticBuffer, batch: Batch, gains: Tensor, *, do_expand: bool, do_cpu_sync: bool
) -> tuple[Tensor, autograd.Dispatched]:
    """Each expert multiplies the sine of its rows by its gain, the router's weights weigh the outputs.

    Args:
        gains: `[num_local_experts]`.
    """
    sent = autograd.dispatch(
        buffer,
        batch.x,
        batch.topk_idx,
        batch.topk_weights,
        num_experts=len(gains) * buffer.num_ranks,
        expert_alignment=2,
        do_expand=do_expand,
        do_cpu_sync=do_cpu_sync,
    )
    if do_expand:
        ends = sent.handle.psum_num_recv_tokens_per_expert
        starts = torch.cat([ends.new_zeros(1), (ends[:-1] + 1) // 2 * 2])
        row = torch.arange(len(sent.recv_x)).unsqueeze(1)
        is_of_expert = (row >= starts) & (row < ends)
        scale = sent.recv_topk_weights * (is_of_expert * gains).sum(1)
    else:
        gain_of_entry = torch.where(sent.recv_topk_idx >= 0, gains[sent.recv_topk_idx.clamp(min=0)], 0)
        scale = (sent.recv_topk_weights * gain_of_entry).sum(1)
    outputs = torch.sin(sent.recv_x) * scale.unsqueeze(1)
    return autograd.combine(buffer, outputs, sent.handle).x, sent


def run_block_here(batch: Batch, all_gains: Tensor) -> Tensor:
    """The same on one process, without dispatch or combine."""
    gain_of_entry = torch.where(batch.topk_idx >= 0, all_gains[batch.topk_idx.clamp(min=0)], 0)
    return torch.sin(batch.x) * (batch.topk_weights * gain_of_entry).sum(1, keepdim=True)


def make_gains(num_experts: int) -> Tensor:
    return torch.linspace(0.5, 2.0, num_experts, dtype=torch.float64)


# Registration


class DeviceStandIn:
    """Makes handles like those of the device backend, while the collective backend moves the rows.

    Only the shapes and dtypes of a plan are right; what the collective backend needs is kept beside it. A handle must
    come back as it was made, with the plan that says that rows lie as they did, unless tensors are copied on the way.
    """

    name = "stand-in"

    def __init__(self, inner: Backend, *, may_copy: bool) -> None:
        self._inner = inner
        self._may_copy = may_copy
        self._plans: dict[int, Plan] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def plan_type(self, x: Tensor, topk_weights: Tensor | None, num_experts: int) -> type[DevicePlan]:
        return DevicePlan

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        if args.handle is not None:
            result = self._inner.dispatch(replace(args, handle=self._without_plan(args.handle)), scope)
            return replace(result, handle=args.handle)
        result = self._inner.dispatch(args, scope)
        handle = replace(result.handle, recv_src_metadata=_in_common_memory(result.handle.recv_src_metadata))
        num_rows = len(args.topk_idx) if args.do_expand else 0
        self._plans[handle.dispatch_idx] = handle.plan
        num_ranks = dist.get_world_size(self._inner._transport.group)
        shapes = (args.topk_idx.shape, (num_rows, args.num_topk), (num_ranks,))
        parts = PlanParts(
            tensors=[torch.zeros(shape, dtype=torch.int32) for shape in shapes],
            numbers=[version_of(handle.recv_src_metadata)],
        )
        plan = DevicePlan.of_parts(parts, handle.recv_src_metadata)
        return replace(result, handle=replace(handle, plan=plan))

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        return self._inner.combine(replace(args, handle=self._without_plan(args.handle)), scope)

    def _without_plan(self, handle: EPHandle) -> EPHandle:
        assert isinstance(handle.plan, DevicePlan)
        assert self._may_copy or handle.plan.has_row_order(handle.recv_src_metadata)
        return replace(handle, plan=self._plans[handle.dispatch_idx])


def _in_common_memory(metadata: Tensor) -> Tensor:
    """A copy that shares its memory with more, as kernels write it: torch counts no change."""
    memory = torch.empty(metadata.numel() + 1, dtype=metadata.dtype)
    copy = memory[1:].view(metadata.shape)
    ctypes.memmove(copy.data_ptr(), metadata.data_ptr(), metadata.numel() * metadata.element_size())
    return copy


def with_device_plans(buffer: ElasticBuffer, *, may_copy: bool = False) -> ElasticBuffer:
    buffer.runtime = DeviceStandIn(buffer.runtime, may_copy=may_copy)
    return buffer


def check_compiled_with_device_plans() -> None:
    """The plan of the device backend gets through compiled programs, forward and backward."""
    ep_gradients.check_compiled_variants(open_buffer=lambda: with_device_plans(ep_gradients.open_block_buffer()))


def check_plan_knows_of_changed_metadata() -> None:
    """A plan that went through operators says so when rows of the metadata were permuted in place since."""
    buffer = with_device_plans(open_buffer())
    batch = Batch.of_rank(dist.get_rank(), num_tokens=5, num_experts=2 * dist.get_world_size())
    for do_expand, do_cpu_sync in LAYOUTS:
        for grad_mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with grad_mode():
                sent = run_block(buffer, batch, make_gains(4)[:2], do_expand=do_expand, do_cpu_sync=do_cpu_sync)[1]
            handle = sent.handle.to_handle()
            assert handle.plan.has_row_order(handle.recv_src_metadata)
            assert not handle.plan.has_row_order(handle.recv_src_metadata.clone())
            if grad_mode is not torch.inference_mode:
                handle.recv_src_metadata.copy_(handle.recv_src_metadata.flip(0))
                for later in (handle, sent.handle.to_handle()):
                    assert not later.plan.has_row_order(later.recv_src_metadata)


def failed_operator_checks(topk_idx_dtype: torch.dtype, has_weights: bool, has_device_plans: bool) -> list[str]:
    """What `torch.library.opcheck` finds wrong, over both layouts and both kinds of sizes; empty if nothing.

    On a group of rank 0 alone, since it calls the operators as often as it likes.
    """
    if dist.get_rank() != 0:
        return []
    buffer = open_buffer(own_group())
    if has_device_plans:
        # The checks copy what they pass.
        with_device_plans(buffer, may_copy=True)
    batch = Batch.of_rank(0, num_tokens=5, num_experts=4)
    x = batch.x.detach().float().requires_grad_()
    topk_idx = batch.topk_idx.to(topk_idx_dtype)
    weights = batch.topk_weights.detach().float().requires_grad_() if has_weights else None
    bias = torch.randn_like(x).requires_grad_()
    failed = []
    for do_expand, do_cpu_sync in LAYOUTS:
        settings = (buffer.id, 4, MAX_TOKENS, 2, do_expand)
        recv_x, _, recv_weights, routing = torch.ops.deep_ep_ep.dispatch(x, topk_idx, weights, *settings, do_cpu_sync)
        tensors = [topk_idx, *routing]
        rows = torch.randn_like(recv_x).requires_grad_()
        back_weights = torch.rand_like(recv_weights).requires_grad_() if has_weights else None
        calls = {
            "dispatch": (x, topk_idx, weights, *settings, do_cpu_sync),
            "dispatch_cached": (x, weights, tensors, len(recv_x), *settings),
            "combine": (rows, back_weights, bias, tensors, *settings),
        }
        for name, arguments in calls.items():
            checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
            if name != "dispatch":
                # It compares two calls to the bit, but each dispatch numbers itself, and leaves rows of metadata that
                # no token stands behind as they are.
                checks.append("test_aot_dispatch_dynamic")
            operator = getattr(torch.ops.deep_ep_ep, name).default
            outcome = torch.library.opcheck(operator, arguments, test_utils=checks, raise_exception=False)
            failed += [
                f"{name} {check}, expand={do_expand} sync={do_cpu_sync}: {result}"
                for check, result in outcome.items()
                if result != "SUCCESS"
            ]
    return failed


def check_compiled_block_meets_other_buffers() -> None:
    """One compiled function may be given buffer after buffer: each is a number that the program must not keep."""
    rank, num_experts = dist.get_rank(), 2 * dist.get_world_size()
    batch = Batch.of_rank(rank, num_tokens=4, num_experts=num_experts)
    gains = make_gains(num_experts)
    own_gains = gains[rank * 2 : rank * 2 + 2]
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def block(buffer: ElasticBuffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor) -> Tensor:
        own = Batch(x=x, topk_idx=topk_idx, topk_weights=topk_weights)
        return run_block(buffer, own, own_gains, do_expand=False, do_cpu_sync=False)[0]

    expected = run_block_here(batch, gains)
    (expected_grad,) = torch.autograd.grad(expected.sum(), batch.x)
    buffers = [open_buffer(None, num_max_tokens_per_rank=max_tokens) for max_tokens in (8, 8, 12)]
    for buffer in [*buffers, *reversed(buffers)]:
        out = block(buffer, batch.x, batch.topk_idx, batch.topk_weights)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), batch.x)[0], expected_grad)


# Buffers that are gone


def errors_in_backward(is_dropped: bool) -> tuple[str, str]:
    """What is said when the backward of a combine, and of a dispatch, finds its buffer dropped or closed."""
    num_experts = 2 * dist.get_world_size()
    batch = Batch.of_rank(dist.get_rank(), num_tokens=4, num_experts=num_experts)
    buffer = open_buffer()
    out, sent = run_block(buffer, batch, make_gains(num_experts)[:2], do_expand=False, do_cpu_sync=True)
    if is_dropped:
        del buffer
        gc.collect()
    else:
        buffer.close()
    messages = []
    for result in (out, sent.recv_x):
        with pytest.raises(ConfigError) as caught:
            result.sum().backward(retain_graph=True)
        messages.append(str(caught.value))
    assert batch.x.grad is None
    return messages[0], messages[1]


def check_saved_results_keep_no_buffer_alive() -> None:
    """A graph must not hold on to gigabytes of a buffer that its owner has dropped."""
    num_experts = 2 * dist.get_world_size()
    batch = Batch.of_rank(dist.get_rank(), num_tokens=4, num_experts=num_experts)
    buffer = open_buffer()
    buffer_id = buffer.id
    out, sent = run_block(buffer, batch, make_gains(num_experts)[:2], do_expand=True, do_cpu_sync=True)
    del buffer
    gc.collect()
    with pytest.raises(ConfigError, match=f"number {buffer_id}, which was dropped"):
        sent.handle.to_handle()
    assert out.grad_fn is not None


# Gradients


def check_second_derivatives() -> None:
    """Gradients of gradients pass through dispatch and combine, for rows, weights and the experts' parameters."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = 2 * num_ranks
    batch = Batch.of_rank(rank, num_tokens=4, num_experts=num_experts)
    gains = make_gains(num_experts)
    own_gains = gains[rank * 2 : rank * 2 + 2]
    buffer = open_buffer()

    def second(out: Tensor) -> tuple[Tensor, ...]:
        grads = torch.autograd.grad(out.pow(2).sum(), (batch.x, batch.topk_weights), create_graph=True)
        scalar = sum(grad.pow(3).sum() for grad in grads)
        return torch.autograd.grad(scalar, (batch.x, batch.topk_weights))

    expected = second(run_block_here(batch, gains))
    assert all(grad.abs().sum() > 0 for grad in expected)
    for do_expand, do_cpu_sync in LAYOUTS:
        got = second(run_block(buffer, batch, own_gains, do_expand=do_expand, do_cpu_sync=do_cpu_sync)[0])
        for name, actual, wanted in zip(("x", "topk_weights"), got, expected, strict=True):
            torch.testing.assert_close(actual, wanted, msg=lambda text, name=name: f"{name}: {text}")


def check_second_derivatives_by_differences() -> None:
    """The same against finite differences, on a group of this rank alone."""
    buffer = open_buffer(own_group())
    batch = Batch.of_rank(0, num_tokens=2, num_experts=4)
    gains = make_gains(4)
    for do_expand, do_cpu_sync in LAYOUTS:

        def block(x: Tensor, weights: Tensor, do_expand: bool = do_expand, do_cpu_sync: bool = do_cpu_sync) -> Tensor:
            own = Batch(x=x, topk_idx=batch.topk_idx, topk_weights=weights)
            return run_block(buffer, own, gains, do_expand=do_expand, do_cpu_sync=do_cpu_sync)[0]

        assert torch.autograd.gradgradcheck(block, (batch.x, batch.topk_weights))


def check_rank_without_tokens_takes_part() -> None:
    """Rank 0 has no token of its own; its experts serve the others, and get their gradients."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = 2 * num_ranks
    batches = [
        Batch.of_rank(each, num_tokens=0 if each == 0 else 5, num_experts=num_experts) for each in range(num_ranks)
    ]
    all_gains = make_gains(num_experts).requires_grad_()
    # Each rank's loss is its own; an expert's gradient sums over all of them.
    total = sum((run_block_here(batch, all_gains) ** 2).sum() for batch in batches)
    (expected_gain_grad,) = torch.autograd.grad(total, all_gains, retain_graph=True)
    expected = torch.autograd.grad(total, (batches[rank].x, batches[rank].topk_weights))
    buffer = open_buffer()
    for do_expand, do_cpu_sync in LAYOUTS:
        gains = make_gains(num_experts)[rank * 2 : rank * 2 + 2].requires_grad_()
        out, _ = run_block(buffer, batches[rank], gains, do_expand=do_expand, do_cpu_sync=do_cpu_sync)
        assert out.shape == batches[rank].x.shape
        grads = torch.autograd.grad((out**2).sum(), (batches[rank].x, batches[rank].topk_weights, gains))
        torch.testing.assert_close(grads[0], expected[0])
        torch.testing.assert_close(grads[1], expected[1])
        assert grads[2].abs().min() > 0
        torch.testing.assert_close(grads[2], expected_gain_grad[rank * 2 : rank * 2 + 2])


def check_ranks_may_use_different_results() -> None:
    """Each rank's loss uses other results than the next one's, yet all take part in every backward step.

    Rank 0 uses the combined rows only, rank 1 the combined weights only; where rank 0 lets the received weights lie,
    rank 1 uses them.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = 2 * num_ranks
    batch = Batch.of_rank(rank, num_tokens=5, num_experts=num_experts)
    buffer = open_buffer()
    rank_of_entry = torch.where(batch.topk_idx >= 0, batch.topk_idx // 2, -1)
    is_on = [(rank_of_entry == each) for each in range(num_ranks)]
    for do_expand, do_cpu_sync in LAYOUTS:
        sent = autograd.dispatch(
            buffer,
            batch.x,
            batch.topk_idx,
            batch.topk_weights,
            num_experts=num_experts,
            do_expand=do_expand,
            do_cpu_sync=do_cpu_sync,
        )
        # Rank 0's experts ignore the weights that they were given.
        weights = sent.recv_topk_weights if rank else torch.full_like(sent.recv_topk_weights, 2.0)
        back = autograd.combine(buffer, sent.recv_x * 3, sent.handle, topk_weights=weights)
        loss = back.x.sum() if rank == 0 else (back.topk_weights**2).sum()
        grad_x, grad_weights = torch.autograd.grad(loss, (batch.x, batch.topk_weights), allow_unused=False)
        if rank == 0:
            copies = sum(on.sum(1) if do_expand else on.any(1) for on in is_on)
            torch.testing.assert_close(grad_x, (3.0 * copies).unsqueeze(1).expand_as(grad_x).double())
            assert not grad_weights.any()
        else:
            assert not grad_x.any()
            # Only the weights that were sent to a rank that gives them back matter.
            expected = torch.where(sum(is_on[1:]) > 0, 2 * batch.topk_weights.detach(), 0.0)
            torch.testing.assert_close(grad_weights, expected)


def check_detached_results_need_no_backward() -> None:
    """Inputs without gradients build no graph, so a backward of the rest makes no call that a rank could miss."""
    num_experts = 2 * dist.get_world_size()
    batch = Batch.of_rank(dist.get_rank(), num_tokens=3, num_experts=num_experts)
    buffer = open_buffer()
    for grad_mode in (torch.no_grad, torch.inference_mode):
        with grad_mode():
            out, sent = run_block(buffer, batch, make_gains(num_experts)[:2], do_expand=True, do_cpu_sync=False)
        assert out.grad_fn is None
        assert sent.recv_x.grad_fn is None
        assert all(tensor.grad_fn is None for tensor in sent.handle.tensors)
    out, sent = run_block(buffer, batch, make_gains(num_experts)[:2], do_expand=False, do_cpu_sync=True)
    assert out.requires_grad
    assert not any(tensor.requires_grad for tensor in sent.handle.tensors if not tensor.is_floating_point())
