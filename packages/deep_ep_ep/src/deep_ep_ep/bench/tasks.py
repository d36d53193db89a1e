"""Owns the two calls that a case compares, the library's and the baseline's, and the check of what they return."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deep_ep_core.errors import DeepEPError
from deep_ep_ep.bench import baseline
from deep_ep_ep.bench.cases import Case
from deep_ep_ep.bench.expected import ExpectedRows, Rows, expected_rows, source_rows
from deep_ep_ep.buffer import ElasticBuffer
from deep_ep_ep.handle import EPHandle

__all__ = ["Task", "check_results", "make_task"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """What one rank runs for a case. Both calls are collective, leave their inputs alone, and return the same rows.

    Attributes:
        run: The library's operation.
        run_baseline: The same with torch's all-to-all.
        expected: What both must return.
        num_sms: SMs that the library's operation was given.
    """

    run: Callable[[], Rows]
    run_baseline: Callable[[], Rows]
    expected: ExpectedRows
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
    expected = expected_rows(case, plan, rank=rank)
    my_topk_idx = topk_idx[rank].to(device)
    my_topk_weights = torch.rand(my_topk_idx.shape, device=device)
    first = rank * case.num_tokens
    x = source_rows(torch.arange(first, first + case.num_tokens, device=device), case)

    def dispatch() -> tuple[Rows, EPHandle]:
        recv_x, _, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=my_topk_idx,
            topk_weights=my_topk_weights,
            num_experts=case.num_experts,
            expert_alignment=case.expert_alignment,
            num_sms=case.num_sms,
            do_cpu_sync=case.has_cpu_sync,
            do_expand=case.layout == "expert",
        )
        return recv_x, handle

    def dispatch_baseline() -> Rows:
        if isinstance(x, torch.Tensor):
            return baseline.dispatch(x, plan, group)
        payload, scales = x
        # As bytes: not every backend knows the type.
        recv_payload = baseline.dispatch(payload.view(torch.uint8), plan, group)
        return recv_payload, baseline.dispatch(scales, plan, group)

    if case.op == "combine":
        return _make_combine(case, dispatch, buffer, plan, expected)
    # Its rows are not kept: a window may have room for those of one dispatch.
    handle = dispatch()[1]

    def dispatch_cached() -> Rows:
        return buffer.dispatch(x, handle=handle, num_sms=case.num_sms, do_expand=case.layout == "expert")[0]

    return Task(
        run=dispatch_cached if case.op == "cached-dispatch" else lambda: dispatch()[0],
        run_baseline=dispatch_baseline,
        expected=expected,
        num_sms=handle.num_sms,
    )


def check_results(case: Case, rows: Rows, expected: ExpectedRows, *, rank: int, whose: str) -> None:
    """Check what an operation returned on this rank.

    Args:
        case: The case.
        rows: The result.
        expected: What it must be.
        rank: This rank.
        whose: Who is at fault if it is not: "the library", "the baseline".

    Raises:
        DeepEPError: It is something else.
    """
    if not expected.is_met_by(rows):
        raise DeepEPError(
            f"{whose} must bring each row to its place (got other rows from a {case.op}, layout {case.layout}, "
            f"{case.dtype}, on rank {rank}); times of a wrong result are worth nothing. Please report it, with the "
            "command"
        )


def _make_combine(
    case: Case,
    dispatch: Callable[[], tuple[Rows, EPHandle]],
    buffer: ElasticBuffer,
    plan: baseline.BaselinePlan,
    expected: ExpectedRows,
) -> Task:
    """A combine brings back what a dispatch delivered, where it lies, as if each expert returned its input."""
    recv_x, handle = dispatch()
    assert isinstance(recv_x, torch.Tensor), "cases combine bf16 rows"
    x = recv_x

    @functools.cache
    def ordinary_x() -> torch.Tensor:
        # Rows that lie in a window NCCL sends another way, which hung between ranks that share a GPU (NCCL 2.30.7).
        # Without a CPU sync there are rows behind the real ones.
        return x[: plan.num_rows].clone()

    return Task(
        run=lambda: buffer.combine(x, handle, num_sms=case.num_sms)[0],
        run_baseline=lambda: baseline.combine(ordinary_x(), plan, buffer.group),
        expected=expected,
        num_sms=handle.num_sms,
    )
