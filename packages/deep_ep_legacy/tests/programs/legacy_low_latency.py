"""Low-latency dispatch and combine against plain torch."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest
import torch
import torch.distributed as dist
from legacy_low_latency_cases import (
    HIDDEN,
    Case,
    check_layout,
    check_rows,
    dequantized,
    expected_combined,
    expected_fp8,
    expert_outputs,
    make_batches,
    make_session,
    unpacked,
)

from deep_ep_legacy.logfmt import MAX_RELATIVE_ERROR

FORMATS = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8 rounded": {"use_fp8": True, "round_scale": True},
    "fp8 ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}
FINISHES = {"wait": {}, "event": {"async_finish": True}, "hook": {"return_recv_hook": True}}


def uneven(**changes: object) -> Case:
    num_tokens = ((9, 0, 33, 5, 1, 17, 0, 8) if dist.get_world_size() > 2 else (9, 4))[: dist.get_world_size()]
    return Case(**{"num_tokens": num_tokens, **changes})


def finish(event, hook, finish_name: str) -> None:
    """Do what a caller does before he uses results."""
    assert (event.event is not None) == (finish_name == "event")
    assert (hook is not None) == (finish_name == "hook")
    if hook is not None:
        hook()
        hook()
    elif event.event is not None:
        event.current_stream_wait()


def round_trip(session, case: Case, batches, format_name: str, finish_name: str, **combine_arguments: object) -> None:
    rank, options = dist.get_rank(), {**FORMATS[format_name]}
    batch = batches[rank]
    recv, recv_count, handle, event, hook = session.low_latency_dispatch(
        batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, **options, **FINISHES[finish_name]
    )
    finish(event, hook, finish_name)
    check_layout(case, batches, recv_count, handle)
    num_rows = case.num_ranks * case.num_max_tokens
    if not options["use_fp8"]:
        assert (recv.shape, recv.dtype) == ((case.num_local_experts, num_rows, case.hidden), torch.bfloat16)
        check_rows(case, [each.x for each in batches], batches, recv)
        rows, sent = recv, batch.x
    else:
        payload, scales = recv
        assert (payload.shape, payload.dtype) == ((case.num_local_experts, num_rows, case.hidden), torch.float8_e4m3fn)
        is_packed = options.get("use_ue8m0", False)
        num_scales = case.hidden // (512 if is_packed else 128)
        assert scales.shape == (case.num_local_experts, num_rows, num_scales)
        assert scales.stride() == (num_rows * num_scales, 1, num_rows)
        assert scales.dtype == (torch.int32 if is_packed else torch.float32)
        if is_packed:
            scales = unpacked(scales)
        expected = [expected_fp8(each.x, round_scale=options.get("round_scale", False)) for each in batches]
        check_rows(case, [each[0] for each in expected], batches, payload.float())
        check_rows(case, [each[1] for each in expected], batches, scales)
        rows, sent = dequantized(payload, scales), dequantized(*expected[rank])
    combined, event, hook = session.low_latency_combine(
        expert_outputs(case, rows, recv_count),
        batch.topk_idx,
        batch.topk_weights,
        handle,
        **FINISHES[finish_name],
        **combine_arguments,
    )
    finish(event, hook, finish_name)
    assert torch.equal(combined, expected_combined(case, batch, sent))


def check_modes() -> int:
    """Every format, finished in every way, with both index types."""
    session, num_checked = make_session(), 0
    for (format_name, finish_name), dtype in zip(
        itertools.product(FORMATS, FINISHES), itertools.cycle([torch.int64, torch.int32]), strict=False
    ):
        case = uneven(index_dtype=dtype)
        round_trip(session, case, make_batches(case), format_name, finish_name)
        num_checked += 1
    return num_checked


def check_sizes() -> None:
    """0, 1, 31, 32, 33 tokens, uneven; all selections of one expert, and none."""
    session, num_ranks = make_session(), dist.get_world_size()
    sizes = [0, 1, 31, 32, 33, 40]
    for first in range(len(sizes)):
        num_tokens = tuple(sizes[(first + rank) % len(sizes)] for rank in range(num_ranks))
        for routing in ("random", "one", "none"):
            case = Case(num_tokens=num_tokens, hidden=128, routing=routing)
            round_trip(session, case, make_batches(case), "bf16", "hook")


def check_hooks_in_any_order() -> None:
    """Two dispatches under way; odd ranks finish the second one first, and rank 0 drops a third."""
    session, rank = make_session(), dist.get_rank()
    cases = [uneven(), uneven(routing="one"), uneven()]
    batches = [make_batches(case) for case in cases]
    posted = []
    for case, of_rank in zip(cases, batches, strict=True):
        batch = of_rank[rank]
        posted.append(
            session.low_latency_dispatch(
                batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False, return_recv_hook=True
            )
        )
    order = [1, 0] if rank % 2 else [0, 1]
    if rank:
        order.append(2)
    for position in order:
        recv_x, recv_count, handle, _, hook = posted[position]
        hook()
        check_layout(cases[position], batches[position], recv_count, handle)
        check_rows(cases[position], [each.x for each in batches[position]], batches[position], recv_x)
    if rank:
        session.close()
    session.clean_low_latency_buffer(40, HIDDEN, 8)
    session.close()


def check_out_and_zero_copy() -> None:
    session, case = make_session(), uneven()
    batches = make_batches(case)
    batch = batches[dist.get_rank()]
    expected = expected_combined(case, batch, batch.x)
    for _ in range(3):
        recv_x, recv_count, handle, _, _ = session.low_latency_dispatch(
            batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False
        )
        x = expert_outputs(case, recv_x, recv_count)
        buffer = session.get_next_low_latency_combine_buffer(handle)
        assert (buffer.shape, buffer.dtype) == (x.shape, torch.bfloat16)
        buffer[:] = x
        out = torch.full_like(batch.x, torch.nan)
        combined, _, hook = session.low_latency_combine(
            torch.zeros_like(x),
            batch.topk_idx,
            batch.topk_weights,
            handle,
            zero_copy=True,
            out=out,
            return_recv_hook=True,
        )
        hook()
        assert combined is out
        assert torch.equal(out, expected)
        # The other half has its turn, so what was filled before does not count.
        other = session.get_next_low_latency_combine_buffer(handle)
        assert other.data_ptr() != buffer.data_ptr()


def check_logfmt() -> None:
    """Small values within the codec's bound; values of 1 and above, which are not encoded, exact."""
    session, rank = make_session(), dist.get_rank()
    for scale, is_exact in ((2.0**-7, False), (64.0, True)):
        case = uneven(num_topk=2)
        batches = make_batches(case)
        batch = batches[rank]
        x = (batch.x.float().abs().clamp(2.0**-4, 8) * scale).to(torch.bfloat16)
        recv_x, recv_count, handle, _, _ = session.low_latency_dispatch(
            x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False
        )
        combined, _, _ = session.low_latency_combine(
            expert_outputs(case, recv_x, recv_count), batch.topk_idx, batch.topk_weights, handle, use_logfmt=True
        )
        expected = expected_combined(case, batch, x)
        if is_exact:
            assert torch.equal(combined, expected)
        else:
            # All terms are positive, so their relative errors bound that of the sum; bfloat16 rounds once more.
            assert len(x) == 0 or not torch.equal(combined, expected)
            torch.testing.assert_close(combined.float(), expected.float(), rtol=MAX_RELATIVE_ERROR + 2.0**-7, atol=0)


def check_stats() -> None:
    """Rows are counted onto what is there; waiting is charged to the rank that was waited for."""
    session, case = make_session(), uneven()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    batches = make_batches(case)
    batch = batches[rank]
    counts = torch.full((case.num_local_experts,), 5, dtype=torch.int32)
    waits = torch.zeros(num_ranks, dtype=torch.int64)
    recv_x, recv_count, handle, _, _ = session.low_latency_dispatch(
        batch.x,
        batch.topk_idx,
        case.num_max_tokens,
        case.num_experts,
        counts,
        waits,
        use_fp8=False,
    )
    assert torch.equal(counts, recv_count + 5)
    combine_waits = torch.zeros(num_ranks, dtype=torch.int64)
    session.low_latency_combine(
        expert_outputs(case, recv_x, recv_count),
        batch.topk_idx,
        batch.topk_weights,
        handle,
        combine_wait_recv_cost_stats=combine_waits,
    )
    for each in (waits, combine_waits):
        assert each[rank] == 0
        assert bool((each >= 0).all())
    assert int(combine_waits.sum()) > 0
    session.clean_low_latency_buffer(case.num_max_tokens, case.hidden, case.num_experts)


def check_repeated() -> None:
    """Rows lie in the same order every time."""
    session, case = make_session(), uneven()
    batch = make_batches(case)[dist.get_rank()]
    seen = set()
    for _ in range(20):
        recv_x, recv_count, *_ = session.low_latency_dispatch(
            batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False
        )
        rows = [recv_x[local, :count].view(torch.int16).tolist() for local, count in enumerate(recv_count.tolist())]
        seen.add(str(rows))
    assert len(seen) == 1


def check_inference_mode() -> None:
    """Calls, their hooks, and what fills their memory may be on either side of the border of inference mode."""
    session, case = make_session(), uneven()
    batches = make_batches(case)
    batch = batches[dist.get_rank()]
    for is_call_in in (True, False):
        with torch.inference_mode(is_call_in):
            recv_x, recv_count, handle, _, hook = session.low_latency_dispatch(
                batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False, return_recv_hook=True
            )
        with torch.inference_mode(not is_call_in):
            hook()
        check_layout(case, batches, recv_count, handle)
        with torch.inference_mode(is_call_in):
            buffer = session.get_next_low_latency_combine_buffer(handle)
        with torch.inference_mode(not is_call_in):
            buffer.copy_(expert_outputs(case, recv_x, recv_count))
        with torch.inference_mode(is_call_in):
            combined, _, hook = session.low_latency_combine(
                recv_x, batch.topk_idx, batch.topk_weights, handle, zero_copy=True, return_recv_hook=True
            )
        with torch.inference_mode(not is_call_in):
            hook()
        assert torch.equal(combined, expected_combined(case, batch, batch.x))
        if not is_call_in:
            # Results of a call outside of inference mode are ordinary, wherever their hook was called.
            recv_x.zero_()
            combined.zero_()


def check_zero_copy_needs_its_turn() -> None:
    """A call in between takes the turn of the buffer, also of one that has been filled."""
    session, case = make_session(), uneven()
    batch = make_batches(case)[dist.get_rank()]
    dispatch = (batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts)
    recv_x, _, handle, _, _ = session.low_latency_dispatch(*dispatch, use_fp8=False)
    session.get_next_low_latency_combine_buffer(handle).zero_()
    session.low_latency_dispatch(*dispatch, use_fp8=False)
    with pytest.raises(ValueError, match="get_next_low_latency_combine_buffer"):
        session.low_latency_combine(recv_x, batch.topk_idx, batch.topk_weights, handle, zero_copy=True)


def check_masked_rank_is_left_out() -> float:
    """The last rank is masked by all others and stays away; returns how long they took."""
    session, case = make_session(timeout_s=60, enable_shrink=True), uneven()
    rank, gone = dist.get_rank(), dist.get_world_size() - 1
    status = torch.zeros(gone + 1, dtype=torch.int32)
    start = time.monotonic()
    if rank != gone:
        session.low_latency_update_mask_buffer(gone, True)
        session.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * gone + [1]
        _round_trip_without(session, case, gone)
        session.clean_low_latency_buffer(case.num_max_tokens, HIDDEN, case.num_experts)
        session.low_latency_clean_mask_buffer()
        session.low_latency_query_mask_buffer(status)
        assert not status.any()
    return time.monotonic() - start


def _round_trip_without(session, case: Case, gone: int) -> None:
    batches = make_batches(case)
    batch = batches[dist.get_rank()]
    recv_x, recv_count, handle, _, hook = session.low_latency_dispatch(
        batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False, return_recv_hook=True
    )
    hook()
    # As if the rank that is gone had no tokens.
    batches[gone].topk_idx.fill_(-1)
    check_layout(case, batches, recv_count, handle)
    check_rows(case, [each.x for each in batches], batches, recv_x)
    combined, _, hook = session.low_latency_combine(
        expert_outputs(case, recv_x, recv_count), batch.topk_idx, batch.topk_weights, handle, return_recv_hook=True
    )
    hook()
    assert torch.equal(combined, expected_combined(case, batch, batch.x, masked=(gone,)))


def check_rank_masked_after_dispatch_is_left_out() -> None:
    """The last rank leaves between dispatch and combine; its tokens and its experts are left out of the latter."""
    session, case = make_session(timeout_s=60, enable_shrink=True), uneven()
    rank, gone = dist.get_rank(), dist.get_world_size() - 1
    batch = make_batches(case)[rank]
    recv_x, recv_count, handle, *_ = session.low_latency_dispatch(
        batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, use_fp8=False
    )
    if rank != gone:
        session.low_latency_update_mask_buffer(gone, True)
        combined, *_ = session.low_latency_combine(
            expert_outputs(case, recv_x, recv_count), batch.topk_idx, batch.topk_weights, handle
        )
        assert torch.equal(combined, expected_combined(case, batch, batch.x, masked=(gone,)))


def check_late_rank_is_masked(timeout_s: float) -> list[int]:
    """The last rank does not come; the others go on without."""
    session, case = make_session(timeout_s=timeout_s, enable_shrink=True), uneven()
    num_ranks = dist.get_world_size()
    status = torch.zeros(num_ranks, dtype=torch.int32)
    if dist.get_rank() != num_ranks - 1:
        for _ in range(2):
            _round_trip_without(session, case, num_ranks - 1)
        session.low_latency_query_mask_buffer(status)
    return status.tolist()


def check_dead_rank_is_masked() -> list[int]:
    """The last rank dies while all work; the others notice at once, and go on without."""
    session, case = make_session(timeout_s=60, enable_shrink=True), uneven()
    num_ranks = dist.get_world_size()
    round_trip(session, case, make_batches(case), "bf16", "hook")
    if dist.get_rank() == num_ranks - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    _round_trip_without(session, case, num_ranks - 1)
    assert time.monotonic() - start < 30
    status = torch.zeros(num_ranks, dtype=torch.int32)
    session.low_latency_query_mask_buffer(status)
    return status.tolist()
