"""The low-latency calls on the device backend against the collective one, on ranks that have a GPU or share one.

usage: python -m deep_ep_core.launch --device cuda --ranks 4 legacy_device_low_latency.py [check ...]
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from legacy_low_latency import FINISHES, FORMATS, finish
from legacy_low_latency_cases import Batch, Case, apply_expert, dequantized, make_batches, unpacked

from deep_ep_core.local import run_as_script
from deep_ep_legacy import Buffer
from deep_ep_legacy.logfmt import MAX_RELATIVE_ERROR

LARGEST = {"num_max_tokens": 80, "hidden": 7168, "experts_per_rank": 8}
Problem = tuple[Case, list[Batch]]


def use_gpu() -> None:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def make_buffer(**options: object) -> Buffer:
    """A buffer on the device backend, large enough for all cases of this file."""
    use_gpu()
    num_ranks = dist.get_world_size()
    num_rdma_bytes = Buffer.get_low_latency_rdma_size_hint(
        LARGEST["num_max_tokens"], LARGEST["hidden"], num_ranks, LARGEST["experts_per_rank"] * num_ranks
    )
    settings = {"backend": "device", "num_cpu_timeout_secs": 20, **options}
    return Buffer(dist.group.WORLD, 0, num_rdma_bytes, low_latency_mode=True, explicitly_destroy=True, **settings)


def make_oracle() -> Buffer:
    """Low-latency calls on the collective backend, on tensors of the CPU."""
    return Buffer(dist.group.WORLD, low_latency_mode=True, backend="collective", num_cpu_timeout_secs=60)


def uneven(**changes: object) -> Case:
    num_tokens = (9, 0, 33, 5, 40, 1, 32, 31)[: dist.get_world_size()]
    return Case(**{"num_tokens": num_tokens, "num_experts": 4 * dist.get_world_size(), **changes})


def on_gpu(batch: Batch) -> Batch:
    return Batch(x=batch.x.cuda(), topk_idx=batch.topk_idx.cuda(), topk_weights=batch.topk_weights.cuda())


def same(name: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    # A copy: with one row, `contiguous` leaves strides that no view of another type takes.
    got, expected = (each.cpu().clone(memory_format=torch.contiguous_format) for each in (got, expected))
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (name, got.shape, got.dtype, expected.dtype)
    if got.numel() == 0:
        return
    got_bytes, expected_bytes = (each.view(-1).view(torch.uint8).view(len(each), -1) for each in (got, expected))
    differs = (got_bytes != expected_bytes).any(1)
    if bool(differs.any()):
        first = int(differs.nonzero()[0])
        raise AssertionError(
            f"{name} on rank {dist.get_rank()}: {int(differs.sum())} of {len(got)} rows differ, first {first}: "
            f"{got[first].flatten()[:8].tolist()} for {expected[first].flatten()[:8].tolist()}"
        )


def same_dispatch(name: str, got: tuple, expected: tuple) -> None:
    """All that a dispatch returns, to the bit; rows past the counts are anything."""
    recv, count, handle = got[:3]
    expected_recv, expected_count, expected_handle = expected[:3]
    same(f"{name} recv_count", count, expected_count)
    same(f"{name} layout_range", handle[1], expected_handle[1])
    assert handle[2:] == expected_handle[2:], name
    parts = [("rows", recv, expected_recv)]
    if isinstance(recv, tuple):
        assert recv[1].stride() == expected_recv[1].stride(), (name, recv[1].stride())
        parts = [("rows", recv[0], expected_recv[0]), ("scales", recv[1], expected_recv[1])]
    parts.append(("src_info", handle[0], expected_handle[0]))
    for local, num_rows in enumerate(expected_count.tolist()):
        for part, tensor, expected_tensor in parts:
            same(f"{name} {part} of expert {local}", tensor[local, :num_rows], expected_tensor[local, :num_rows])


def outputs_of_experts(case: Case, recv: object, count: torch.Tensor) -> torch.Tensor:
    """What experts make of what the oracle received, on the CPU; NaN past the counts."""
    if isinstance(recv, tuple):
        payload, scales = recv
        rows = dequantized(payload, unpacked(scales) if scales.dtype == torch.int32 else scales)
    else:
        rows = recv
    x = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16)
    for local, num_rows in enumerate(count.tolist()):
        expert = dist.get_rank() * case.num_local_experts + local
        x[local, :num_rows] = apply_expert(rows[local, :num_rows], expert)
    return x


def check_round(
    name: str, buffer: Buffer, oracle: Buffer, problem: Problem, options: dict, finish_name: str, **combining: object
) -> None:
    """One dispatch and one combine of both backends."""
    case, batches = problem
    batch = batches[dist.get_rank()]
    mine = on_gpu(batch)
    got = buffer.low_latency_dispatch(
        mine.x, mine.topk_idx, case.num_max_tokens, case.num_experts, **options, **FINISHES[finish_name]
    )
    finish(got[3], got[4], finish_name)
    expected = oracle.low_latency_dispatch(batch.x, batch.topk_idx, case.num_max_tokens, case.num_experts, **options)
    same_dispatch(name, got, expected)
    x = outputs_of_experts(case, expected[0], expected[1])
    x_gpu = x.cuda()
    if combining.get("zero_copy"):
        place = buffer.get_next_low_latency_combine_buffer(got[2])
        place.copy_(x_gpu)
        x_gpu = torch.zeros_like(x_gpu)
    out = torch.full_like(mine.x, torch.nan) if combining.pop("has_out", False) else None
    combined, event, hook = buffer.low_latency_combine(
        x_gpu, mine.topk_idx, mine.topk_weights, got[2], out=out, **FINISHES[finish_name], **combining
    )
    finish(event, hook, finish_name)
    assert out is None or combined is out
    expected_combined = oracle.low_latency_combine(x, batch.topk_idx, batch.topk_weights, expected[2])[0]
    same(f"{name} combined", combined, expected_combined)


def check_modes() -> int:
    """Every format, finished in every way, with both index types, zero-copy and `out`."""
    buffer, oracle, num_checked = make_buffer(), make_oracle(), 0
    dtypes, copies = itertools.cycle([torch.int64, torch.int32]), itertools.cycle([False, True, True])
    for format_name, finish_name in itertools.product(FORMATS, FINISHES):
        case = uneven(index_dtype=next(dtypes))
        name = f"{format_name}, {finish_name}"
        combining = {"zero_copy": next(copies), "has_out": next(copies)}
        check_round(name, buffer, oracle, (case, make_batches(case)), FORMATS[format_name], finish_name, **combining)
        num_checked += 1
    buffer.destroy()
    return num_checked


def check_shapes() -> None:
    """Rows of 128 to 7168 channels, 1 to 12 selections, all to one expert, and none."""
    buffer, oracle = make_buffer(), make_oracle()
    num_ranks = dist.get_world_size()
    changes = [
        {"hidden": 128},
        {"hidden": 640, "num_topk": 1},
        {"hidden": 7168, "num_topk": 8, "num_experts": 8 * num_ranks},
        {"num_experts": num_ranks, "num_topk": 1},
        {"routing": "one"},
        {"routing": "none"},
        {"num_topk": min(12, 4 * num_ranks), "num_max_tokens": 41},
    ]
    for change, format_name in itertools.product(changes, ("bf16", "fp8")):
        case = uneven(**change)
        check_round(str(change), buffer, oracle, (case, make_batches(case)), FORMATS[format_name], "wait")
    buffer.destroy()


def check_logfmt() -> float:
    """Small values within the codec's bound, values that are not encoded exact. Returns how many differ at all."""
    buffer, oracle = make_buffer(), make_oracle()
    num_differ, num_values = 0, 0
    for scale, hidden, is_exact in ((2.0**-7, 1024, False), (2.0**-7, 1536, False), (64.0, 2048, True)):
        case = uneven(num_topk=2, hidden=hidden)
        batches = make_batches(case)
        # Positive, so that relative errors of the terms bound that of the sum.
        for batch in batches:
            batch.x.copy_((batch.x.float().abs().clamp(2.0**-4, 8) * scale).to(torch.bfloat16))
        batch = batches[dist.get_rank()]
        mine = on_gpu(batch)
        dispatch = (case.num_max_tokens, case.num_experts)
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, *dispatch, use_fp8=False)
        expected = oracle.low_latency_dispatch(batch.x, batch.topk_idx, *dispatch, use_fp8=False)
        x = outputs_of_experts(case, expected[0], expected[1])
        combined, _, hook = buffer.low_latency_combine(
            x.cuda(), mine.topk_idx, mine.topk_weights, got[2], use_logfmt=True, return_recv_hook=True
        )
        hook()
        coded, _, _ = oracle.low_latency_combine(x, batch.topk_idx, batch.topk_weights, expected[2], use_logfmt=True)
        exact, _, _ = oracle.low_latency_combine(x, batch.topk_idx, batch.topk_weights, expected[2])
        if is_exact:
            same("values that are not encoded", combined, exact)
        else:
            bound = MAX_RELATIVE_ERROR + 2.0**-7
            torch.testing.assert_close(combined.cpu().float(), exact.float(), rtol=bound, atol=0)
            assert not bool(exact.any()) or not torch.equal(combined.cpu(), exact)
            num_differ += int((combined.cpu() != coded).sum())
            num_values += coded.numel()
    buffer.destroy()
    share = num_differ / max(num_values, 1)
    # The two take logarithms of other libraries, so codes at a border may differ.
    assert share < 0.01, share
    return share


def check_stats() -> None:
    """Rows are counted onto what is there; waiting is charged to the rank that was waited for."""
    buffer, oracle, case = make_buffer(), make_oracle(), uneven()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    batch = make_batches(case)[rank]
    mine = on_gpu(batch)
    counts = torch.full((case.num_local_experts,), 5, dtype=torch.int32, device="cuda")
    waits = torch.zeros(num_ranks, dtype=torch.int64, device="cuda")
    dispatch = (case.num_max_tokens, case.num_experts)
    late = num_ranks - 1
    for is_split in (False, True):
        torch.cuda.synchronize()
        dist.barrier()
        if rank == late:
            time.sleep(0.2)
        before = waits.clone()
        _, count, handle, _, hook = buffer.low_latency_dispatch(
            mine.x, mine.topk_idx, *dispatch, counts, waits, use_fp8=False, return_recv_hook=is_split
        )
        if hook is not None:
            hook()
        waited = (waits - before).tolist()
        assert waited[rank] == 0, waited
        assert min(waited) >= 0, waited
        assert rank == late or waited[late] > 10_000_000, waited
    expected = oracle.low_latency_dispatch(batch.x, batch.topk_idx, *dispatch, use_fp8=False)
    assert torch.equal(counts.cpu(), 2 * expected[1] + 5)
    waits.zero_()
    x = torch.zeros(*handle[0].shape, case.hidden, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    dist.barrier()
    if rank == late:
        time.sleep(0.2)
    buffer.low_latency_combine(x, mine.topk_idx, mine.topk_weights, handle, combine_wait_recv_cost_stats=waits)
    waited = waits.tolist()
    assert waited[rank] == 0, waited
    assert rank == late or waited[late] > 10_000_000, waited
    buffer.clean_low_latency_buffer(case.num_max_tokens, case.hidden, case.num_experts)
    torch.cuda.synchronize()
    assert int(count.sum()) == int(expected[1].sum())
    buffer.destroy()


def check_hooks_in_any_order() -> None:
    """Two calls under way, received in either order; what is dropped is received by the third call."""
    buffer, oracle, case = make_buffer(), make_oracle(), uneven()
    rank = dist.get_rank()
    problems = [make_batches(dataclasses.replace(case, num_topk=num_topk))[rank] for num_topk in (1, 2, 3, 4)]
    dispatch = (case.num_max_tokens, case.num_experts)
    expected = [oracle.low_latency_dispatch(batch.x, batch.topk_idx, *dispatch) for batch in problems]
    for order in ((0, 1, 2, 3), (1, 0, 3, 2), ()):
        got = []
        for first in (0, 2):
            for batch in problems[first : first + 2]:
                mine = on_gpu(batch)
                got.append(buffer.low_latency_dispatch(mine.x, mine.topk_idx, *dispatch, return_recv_hook=True))
            for idx in order:
                if first <= idx < first + 2:
                    got[idx][4]()
        if not order:
            buffer.clean_low_latency_buffer(*dispatch[:1], case.hidden, case.num_experts)
            buffer.clean_low_latency_buffer(*dispatch[:1], case.hidden, case.num_experts)
        for idx, each in enumerate(got):
            same_dispatch(f"dispatch {idx} of order {order}", each, expected[idx])
    buffer.destroy()


def check_random_rounds(num_rounds: int = 200, seed: int = 0) -> int:
    """Rounds of any size, format and way of finishing, on one buffer, with nothing between them."""
    buffer, oracle = make_buffer(), make_oracle()
    num_ranks, choose = dist.get_world_size(), random.Random(seed)
    for round_idx in range(num_rounds):
        num_max_tokens = choose.choice((1, 7, 33, 80))
        experts_per_rank = choose.choice((1, 2, 3, 8))
        format_name = choose.choice(list(FORMATS))
        hidden = 512 * choose.choice((1, 2, 3, 5)) if format_name == "fp8 ue8m0" else 128 * choose.randint(1, 14)
        case = Case(
            num_tokens=tuple(
                choose.choice((0, 1, num_max_tokens, choose.randint(0, num_max_tokens))) for _ in range(num_ranks)
            ),
            num_max_tokens=num_max_tokens,
            num_experts=experts_per_rank * num_ranks,
            num_topk=choose.randint(1, min(9, experts_per_rank * num_ranks)),
            hidden=hidden,
            routing=choose.choice(("random", "random", "random", "none", "one"))
            if experts_per_rank * num_ranks > 1
            else "random",
            index_dtype=choose.choice((torch.int64, torch.int32)),
        )
        combining = {"zero_copy": choose.random() < 0.3, "has_out": choose.random() < 0.3}
        finish_name = choose.choice(list(FINISHES))
        name = f"round {round_idx}: {case}, {format_name}, {finish_name}"
        check_round(name, buffer, oracle, (case, make_batches(case)), FORMATS[format_name], finish_name, **combining)
    buffer.destroy()
    return num_rounds


def check_graphs(num_replays: int = 20) -> int:
    """A graph with an odd number of calls is right at each replay, whatever it is given, next to calls outside."""
    buffer, oracle = make_buffer(), make_oracle()
    rank, case = dist.get_rank(), uneven(num_topk=4)
    batches = make_batches(case)
    mine = on_gpu(batches[rank])
    dispatch = (case.num_max_tokens, case.num_experts)

    def step() -> tuple:
        got = buffer.low_latency_dispatch(mine.x, mine.topk_idx, *dispatch, return_recv_hook=True)
        rows = buffer.low_latency_dispatch(mine.x, mine.topk_idx, *dispatch, use_fp8=False, return_recv_hook=True)
        got[4]()
        rows[4]()
        combined, _, hook = buffer.low_latency_combine(
            rows[0], mine.topk_idx, mine.topk_weights, rows[2], return_recv_hook=True
        )
        hook()
        return got, rows, combined

    # The first calls load kernels, which a capture must not.
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got, rows, combined = step()
    for seed in range(1, num_replays + 1):
        generator = torch.Generator().manual_seed(1000 * seed + rank)
        x = torch.randn(mine.x.shape, generator=generator).to(torch.bfloat16)
        topk_idx = torch.rand(len(x), case.num_experts, generator=generator).argsort(1)[:, :4].contiguous()
        topk_idx[torch.rand(topk_idx.shape, generator=generator) < (0, 0.3, 1)[seed % 3]] = -1
        mine.x.copy_(x)
        mine.topk_idx.copy_(topk_idx)
        graph.replay()
        expected = oracle.low_latency_dispatch(x, topk_idx, *dispatch)
        same_dispatch(f"replay {seed}", got, expected)
        expected = oracle.low_latency_dispatch(x, topk_idx, *dispatch, use_fp8=False)
        same_dispatch(f"replay {seed}, bfloat16", rows, expected)
        back = torch.nan_to_num(rows[0].cpu())
        same(
            f"replay {seed} combined",
            combined,
            oracle.low_latency_combine(back, topk_idx, batches[rank].topk_weights, expected[2])[0],
        )
        if seed % 5 == 0:
            check_round(f"outside, {seed}", buffer, oracle, (case, batches), FORMATS["fp8"], "wait")
    for _ in range(num_replays):
        graph.replay()
    torch.cuda.synchronize()
    same_dispatch("replays behind each other", rows, expected)
    buffer.destroy()
    return num_replays


CHECKS: tuple[Callable[[], object], ...] = (
    check_modes,
    check_shapes,
    check_logfmt,
    check_stats,
    check_hooks_in_any_order,
    check_graphs,
    check_random_rounds,
)


def timed(check: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        begin = time.monotonic()
        result = check()
        if dist.get_rank() == 0:
            print(f"right: {check.__name__} {result}, {time.monotonic() - begin:.1f} s", flush=True)

    run.__name__ = check.__name__
    return run


if __name__ == "__main__":
    run_as_script(*[timed(check) for check in CHECKS if check.__name__ in sys.argv[1:] or len(sys.argv) == 1])
