"""Sizes at which the device backend takes another way, and calls that it hands to the collective one."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ep_cases import SETTING, Case, Expected, make_buffer, with_ranks
from ep_device_setting import as_on_several_gpus, context_of, on_device
from ep_modes import PLAIN, check_all_modes, check_case, check_round_trip
from ep_rows import Problem, arrival_of, check_arrival, check_combined, check_rows, make_problem

from deep_ep_core.errors import ConfigError
from deep_ep_ep import ElasticBuffer
from deep_ep_ep.device.context import MAX_NUM_EXPERTS


def make_large_buffer(
    num_max_tokens: int,
    hidden: int,
    *,
    largest: tuple[int, int, int] | None = None,
    allow_multiple_reduction: bool = True,
    **options: object,
) -> ElasticBuffer:
    """A buffer of the setting.

    Args:
        num_max_tokens: Default of its calls.
        hidden: For its size.
        largest: Tokens, elements of a row and entries of the call that needs most by way of rails, where the size of
            the setting may not do; None for these tokens and elements with 4 entries.
        allow_multiple_reduction: Of the buffer.
        **options: Of the buffer.
    """
    arguments = {"num_max_tokens_per_rank": num_max_tokens, "hidden": hidden, "num_cpu_timeout_secs": 60}
    arguments = {**arguments, **SETTING.options, **options, "allow_multiple_reduction": allow_multiple_reduction}
    if SETTING.ranks_per_node:
        needed_bytes = ElasticBuffer.get_buffer_size_hint(
            dist.group.WORLD,
            *(largest or (num_max_tokens, hidden, 4)),
            allow_multiple_reduction=allow_multiple_reduction,
        )
        arguments["num_bytes"] = max(arguments["num_bytes"], needed_bytes)
    return ElasticBuffer(dist.group.WORLD, **arguments)  # type: ignore[arg-type]


def check_both_ways(buffer: ElasticBuffer, problem: Problem, *, num_sms: int = 0, do_cpu_sync: bool = True) -> None:
    """Both layouts there and back, and both once more with their handles."""
    rank = dist.get_rank()
    x, topk_idx, weights = problem.inputs(rank)
    common = {"num_experts": problem.num_experts, "expert_alignment": problem.expert_alignment, "num_sms": num_sms}
    common["num_max_tokens_per_rank"] = problem.num_max_tokens
    calls = []
    for do_expand in (False, True):
        sent = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, do_expand=do_expand, do_cpu_sync=do_cpu_sync, **common
        )
        again = buffer.dispatch(x, handle=sent[3], topk_weights=weights, do_expand=do_expand, num_sms=num_sms)
        rows = sent[0][0] if isinstance(sent[0], tuple) else sent[0]
        back = None
        if rows.dtype.itemsize > 1:
            has_weights = not do_expand or buffer.allow_multiple_reduction
            back = buffer.combine(rows, sent[3], topk_weights=sent[2] if has_weights else None, num_sms=num_sms)
        calls.append((do_expand, sent, again, back))
    wanted = arrival_of(problem, rank)
    for do_expand, sent, again, back in calls:
        check_arrival(problem, rank, sent, do_cpu_sync=do_cpu_sync)
        check_rows(problem, wanted, again[0], again[2], do_expand=do_expand, do_cpu_sync=do_cpu_sync)
        if back is not None:
            reduction = {"allow_multiple_reduction": buffer.allow_multiple_reduction}
            check_combined(problem, rank, back[0], back[1], do_expand=do_expand, **reduction)


def check_tiles(recv_memory: str, sizes: tuple[int, ...] = (511, 512, 513, 1025, 4096)) -> int:
    """The plan counts 512 tokens at a time: one tile, several in one block, several in each block."""
    num_ranks, num_checked = dist.get_world_size(), 0
    with on_device(recv_memory, num_bytes=96 << 20):
        for size in sizes:
            buffer = make_large_buffer(size, 64)
            # Every other rank has another number of tiles.
            num_tokens = [size if rank % 2 == 0 else size // 3 for rank in range(num_ranks)]
            for seed, num_sms in enumerate((1, 3, 16)):
                problem = make_problem(
                    size + seed, num_tokens, num_experts=4 * num_ranks, num_topk=min(4, 4 * num_ranks), hidden=64
                )
                check_both_ways(buffer, problem, num_sms=num_sms, do_cpu_sync=seed != 1)
                num_checked += 1
            buffer.close()
    return num_checked


# Each: experts a rank, experts in all at least, top-k, hidden, dtype, scale packs, alignment, index dtype.
_WIDE = (
    (4, 16, 4, 8200, torch.bfloat16, 0, 1, torch.int64),  # 16 KiB and 16 bytes: two pieces
    (4, 16, 4, 20480, torch.bfloat16, 0, 4, torch.int64),  # three pieces
    (4, 16, 2, 8, torch.bfloat16, 0, 1, torch.int64),  # the shortest row
    (4, 32, 32, 64, torch.bfloat16, 0, 1, torch.int64),  # the most entries a token
    (2, 2, 32, 64, torch.bfloat16, 0, 1, torch.int32),  # most of them empty
    (1, 1, 8, 256, torch.bfloat16, 8, 1, torch.int64),  # one expert a rank
    (32, 256, 8, 64, torch.bfloat16, 2, 16, torch.int32),  # many experts
    (40, 40, 8, 64, torch.bfloat16, 0, 1, torch.int64),  # more than a warp a rank, no whole number of warps
    (4, 16, 4, 64, torch.float16, 0, 1, torch.int64),
    (4, 16, 4, 64, torch.float32, 0, 1, torch.int64),
    (4, 16, 4, 64, torch.float64, 0, 1, torch.int64),
)


def check_wide_shapes(recv_memory: str) -> int:
    """Long and short rows, many and few entries, experts and scales, all dtypes of combine, both of indices."""
    num_ranks = dist.get_world_size()
    num_tokens = [(33, 40, 1, 0, 17, 40, 5, 39)[rank % 8] for rank in range(num_ranks)]
    with on_device(recv_memory, num_bytes=96 << 20):
        problems = []
        for seed, (num_local, least, num_topk, hidden, dtype, num_packs, alignment, idx_dtype) in enumerate(_WIDE):
            num_experts = max(num_local * num_ranks, -(-least // num_ranks) * num_ranks)
            problem = make_problem(
                seed,
                num_tokens,
                num_experts=num_experts,
                num_topk=num_topk,
                num_max_tokens=40,
                hidden=hidden,
                dtype=dtype,
                num_sf_packs=num_packs,
                expert_alignment=alignment,
                idx_dtype=idx_dtype,
            )
            problems.append(problem)
        # One after the other: they are large where there are many nodes.
        for flag in (True, False):
            with make_large_buffer(40, 20480, allow_multiple_reduction=flag) as buffer:
                for problem in problems:
                    check_both_ways(buffer, problem, num_sms=3)
    return len(_WIDE)


def check_fan_out_at_receiver(recv_memory: str) -> None:
    """Ranks on several GPUs send a row once for all experts of a rank; on one GPU only this check does."""
    num_ranks = dist.get_world_size()
    with on_device(recv_memory, num_bytes=64 << 20), as_on_several_gpus():
        check_all_modes(7, 24)
        buffer = make_large_buffer(40, 8200)
        assert not context_of(buffer).shares_gpu
        for hidden, num_tokens in ((64, 33), (8200, 9)):
            problem = make_problem(3, [num_tokens] * num_ranks, num_experts=8 * num_ranks, num_topk=8, hidden=hidden)
            for do_cpu_sync in (True, False):
                check_both_ways(buffer, problem, num_sms=4, do_cpu_sync=do_cpu_sync)
        buffer.close()


def check_reductions(recv_memory: str, first: int = 5) -> int:
    """Modes of a buffer that rounds once, and that ignores the hierarchy."""
    options = {"allow_multiple_reduction": False, "allow_hybrid_mode": False}
    with on_device(recv_memory, num_bytes=64 << 20):
        return check_all_modes(first, 24, options)


def check_calls_of_the_collective_backend(recv_memory: str) -> None:
    """CPU tensors, float64 weights and more experts than a plan has room for: right, by the other backend."""
    num_ranks = dist.get_world_size()
    with on_device(recv_memory, num_bytes=64 << 20):
        case = with_ranks(Case(num_tokens=(9, 3, 0, 12), device="cpu"))
        buffer = make_buffer(case)
        context_of(buffer)
        check_round_trip(buffer, Expected.of(case), PLAIN)
        on_gpu = with_ranks(Case(num_tokens=(9, 3, 0, 12)))
        check_round_trip(buffer, Expected.of(on_gpu), PLAIN)
        problem = make_problem(
            2, [9] * num_ranks, num_experts=MAX_NUM_EXPERTS + 8 * num_ranks, num_topk=4, num_max_tokens=48, hidden=256
        )
        check_both_ways(buffer, problem)
        x, topk_idx, weights = problem.inputs(dist.get_rank())
        recv_x, _, recv_weights, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights.double(), num_experts=problem.num_experts
        )
        assert recv_weights.dtype == torch.float64
        _, combined_weights, _ = buffer.combine(recv_x, handle, topk_weights=recv_weights)
        expected = torch.where(topk_idx >= 0, weights.double(), 0.0)
        assert torch.equal(combined_weights, expected)
        few_experts = make_problem(2, [9] * num_ranks, num_experts=8 * num_ranks, num_topk=4, hidden=256)
        x, topk_idx, weights = few_experts.inputs(dist.get_rank())
        recv_x, _, recv_weights, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, num_experts=few_experts.num_experts
        )
        with pytest.raises(ConfigError, match="on the device backend must be float32"):
            buffer.combine(recv_x, handle, topk_weights=recv_weights.double())
        buffer.destroy()


def check_smallest(recv_memory: str) -> None:
    """A few tokens, for tools under which kernels are slow."""
    with on_device(recv_memory, num_bytes=2 << 20, num_gpu_timeout_secs=280, num_cpu_timeout_secs=280):
        case = with_ranks(
            Case(num_tokens=(3, 2, 0, 1), num_experts=8, num_topk=2, hidden=16, num_max_tokens_per_rank=4, num_biases=1)
        )
        for do_cpu_sync in (True, False):
            check_case(case, do_cpu_sync=do_cpu_sync)
        check_case(case, {"allow_multiple_reduction": False})
        num_ranks = dist.get_world_size()
        # Two tiles of the plan, and rows in two pieces.
        tiles = make_problem(1, [513] * num_ranks, num_experts=2 * num_ranks, num_topk=2, hidden=16)
        pieces = make_problem(2, [2] * num_ranks, num_experts=2 * num_ranks, num_topk=2, hidden=8200)
        for problem in (tiles, pieces):
            buffer = make_large_buffer(problem.num_max_tokens, problem.hidden)
            check_both_ways(buffer, problem, num_sms=2)
            buffer.close()
