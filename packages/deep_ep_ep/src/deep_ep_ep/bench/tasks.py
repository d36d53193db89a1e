"""Owns the two calls that a case compares, the library's and the baseline's, and the check that they agree.

Values are small integers: their sums are exact in bfloat16, in any order, so both sides must give the very same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from deep_ep_core.errors import DeepEPError
from deep_ep_ep.bench import baseline
from deep_ep_ep.bench.cases import FP8_GROUP_SIZE, Case
from deep_ep_ep.buffer import ElasticBuffer
from deep_ep_ep.handle import EPHandle
from deep_ep_ep.quant import cast_to_fp8

__all__ = ["Rows", "Task", "check_results", "make_task"]

Rows: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

# Sums of 64 of them, twice the longest top-k row, stay within the integers that bfloat16 holds.
_MAX_VALUE = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What one rank runs for a case. Both calls are collective, leave their inputs alone, and return the same rows.

    Attributes:
        run: The library's operation.
        run_baseline: The same with torch's all-to-all.
        real_rows: Which rows of the results are real; None for all of them.
        num_sms: SMs that the library's operation was given.
    """

    run: Callable[[], Rows]
    run_baseline: Callable[[], Rows]
    real_rows: torch.Tensor | None
    num_sms: int


def make_task(case: Case, topk_idx: torch.Tensor, buffer: ElasticBuffer, *, device: torch.device) -> Task:
    """Make the inputs of a case, and the calls on them.

    Args:
        case: The case.
        topk_idx: `[num_ranks, num_tokens, num_topk]` on the CPU: the routing of all ranks.
        buffer: Large enough for the case.
        device: Where the inputs lie.

    Collective: yes.
    """
    rank, group = buffer.rank_idx, buffer.group
    plan = baseline.make_plan(case, topk_idx, rank=rank, device=device)
    my_topk_idx = topk_idx[rank].to(device)
    my_topk_weights = torch.rand(my_topk_idx.shape, device=device)
    x = _make_rows(case, rank, device)

    def dispatch() -> tuple[Rows, EPHandle]:
        recv_x, _, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=my_topk_idx,
            topk_weights=my_topk_weights,
            num_experts=case.num_experts,
            expert_alignment=case.expert_alignment,
            num_sms=case.num_sms,
            do_expand=case.layout == "expert",
        )
        return recv_x, handle

    def dispatch_cached() -> Rows:
        return buffer.dispatch(x, handle=handle, num_sms=case.num_sms, do_expand=case.layout == "expert")[0]

    def dispatch_baseline() -> Rows:
        if isinstance(x, torch.Tensor):
            return baseline.dispatch(x, plan, group)
        payload, scales = x
        # As bytes: not every backend knows the type.
        recv_payload = baseline.dispatch(payload.view(torch.uint8), plan, group)
        return recv_payload, baseline.dispatch(scales, plan, group)

    # A combine brings back what this dispatch delivered, as if each expert returned its input.
    recv_x, handle = dispatch()

    def combine() -> Rows:
        assert isinstance(recv_x, torch.Tensor)
        return buffer.combine(recv_x, handle, num_sms=case.num_sms)[0]

    def combine_baseline() -> Rows:
        assert isinstance(recv_x, torch.Tensor)
        return baseline.combine(recv_x, plan, group)

    real_rows = None if plan.expert_rows is None else plan.expert_rows.expert_row
    if case.op == "combine":
        return Task(run=combine, run_baseline=combine_baseline, real_rows=None, num_sms=handle.num_sms)
    run = dispatch_cached if case.op == "cached-dispatch" else lambda: dispatch()[0]
    return Task(run=run, run_baseline=dispatch_baseline, real_rows=real_rows, num_sms=handle.num_sms)


def check_results(task: Task, *, rank: int) -> None:
    """Run both sides of a task once, and compare what they return on this rank.

    Raises:
        DeepEPError: They differ.

    Collective: yes.
    """
    actual, expected = _real_rows(task.run(), task.real_rows), _real_rows(task.run_baseline(), task.real_rows)
    if not all(torch.equal(*pair) for pair in zip(actual, expected, strict=True)):
        raise DeepEPError(
            f"the library and the torch baseline must return the same rows, but they differ on rank {rank}; times of a "
            "wrong result are worth nothing. Please report it, with the command"
        )


def _make_rows(case: Case, rank: int, device: torch.device) -> Rows:
    generator = torch.Generator().manual_seed(case.seed * case.num_ranks + rank)
    shape = (case.num_tokens, case.hidden)
    x = torch.randint(-_MAX_VALUE, _MAX_VALUE + 1, shape, generator=generator, dtype=torch.int8)
    x_bf16 = x.to(device).to(torch.bfloat16)
    return x_bf16 if case.dtype == "bf16" else cast_to_fp8(x_bf16, group_size=FP8_GROUP_SIZE)


def _real_rows(rows: Rows, real_rows: torch.Tensor | None) -> list[torch.Tensor]:
    """Each tensor's real rows, in a dtype that torch can compare: numbers by value, for a zero may have either sign."""
    tensors = [rows] if isinstance(rows, torch.Tensor) else list(rows)
    tensors = [tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor for tensor in tensors]
    return tensors if real_rows is None else [tensor[real_rows] for tensor in tensors]
