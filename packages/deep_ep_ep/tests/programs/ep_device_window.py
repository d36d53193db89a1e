"""Where the rows of the device backend lie: in the window or not, read in place or pushed, and for how long."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from ep_cases import SETTING, Case, Expected, assert_values_equal, make_buffer, padded, to_device, with_ranks
from ep_device_setting import context_of, is_in_window, on_device
from ep_device_shapes import make_large_buffer
from ep_rows import Problem, check_arrival, check_combined, make_problem

from deep_ep_core.errors import ConfigError
from deep_ep_ep import ElasticBuffer, reference


def check_combine_in_place(recv_memory: str) -> int:
    """Outputs in `empty_like_recv`, in the received tensor itself, and in an ordinary one give the same bits."""
    num_checked = 0
    with on_device(recv_memory, num_bytes=64 << 20):
        case = with_ranks(Case(num_tokens=(33, 31, 1, 20), expert_alignment=4))
        expected, rank = Expected.of(case), dist.get_rank()
        sent = expected.sent[rank]
        x, topk_idx = to_device(case, (sent.x, sent.topk_idx))
        for allow_multiple_reduction in (True, False):
            buffer = make_buffer(case, allow_multiple_reduction=allow_multiple_reduction)
            for do_expand in (False, True):
                outputs = expected.expert_major_outputs() if do_expand else expected.token_major_outputs()
                expected_sum = reference.combine(
                    rank,
                    sent.topk_idx,
                    outputs,
                    expected.received,
                    num_experts=case.num_experts,
                    is_expanded=do_expand,
                    allow_multiple_reduction=allow_multiple_reduction,
                    ranks_per_node=SETTING.ranks_per_node,
                )
                for do_cpu_sync in (True, False):
                    recv_x, _, _, handle, _ = buffer.dispatch(
                        x,
                        topk_idx=topk_idx,
                        num_experts=case.num_experts,
                        expert_alignment=case.expert_alignment,
                        do_expand=do_expand,
                        do_cpu_sync=do_cpu_sync,
                    )
                    assert is_in_window(buffer, recv_x) == (recv_memory != "torch")
                    values = to_device(case, padded(outputs[rank], len(recv_x)))
                    like = buffer.empty_like_recv(handle)
                    assert like.shape == recv_x.shape
                    assert like.dtype == torch.bfloat16
                    # What is left of a page may hold it where nothing else is put into the window.
                    assert is_in_window(buffer, like) or recv_memory == "torch"
                    results = [buffer.combine(values, handle)[0]]
                    for place in (like, recv_x):
                        place.copy_(values)
                        results.append(buffer.combine(place, handle)[0])
                        # A combine that has ended has read its rows on every rank: they may be overwritten.
                        place.fill_(float("nan"))
                    for place_idx, combined in enumerate(results):
                        assert_values_equal(combined, expected_sum, f"combined from place {place_idx}")
                        num_checked += 1
            buffer.destroy()
    return num_checked


def check_pulled_and_pushed_rows_mix(recv_memory: str) -> None:
    """Each rank decides alone where its outputs lie, and the sums are the same."""
    with on_device(recv_memory, num_bytes=64 << 20):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        problem = make_problem(1, [33] * num_ranks, num_experts=4 * num_ranks, num_topk=4)
        buffer = make_large_buffer(33, 64)
        x, topk_idx, weights = problem.inputs(rank)
        for round_idx in range(4):
            for do_expand in (False, True):
                recv_x, _, recv_weights, handle, _ = buffer.dispatch(
                    x,
                    topk_idx=topk_idx,
                    topk_weights=weights,
                    num_experts=problem.num_experts,
                    do_expand=do_expand,
                    num_sms=1 + (rank + round_idx) % 8,
                )
                is_pushed = (rank + round_idx) % 2 == 0
                rows = recv_x.clone() if is_pushed else buffer.empty_like_recv(handle, 64).copy_(recv_x)
                combined, combined_weights, _ = buffer.combine(
                    rows, handle, topk_weights=recv_weights, num_sms=1 + (rank * 3 + round_idx) % 8
                )
                check_combined(problem, rank, combined, combined_weights, do_expand=do_expand)
        buffer.close()


def check_full_heap(recv_memory: str, num_dispatches: int = 80) -> tuple[int, int]:
    """More outputs than the window has room for stay right, and so do the sums of all of them.

    Also: as many handles alive, used in the reverse of their order. Returns how many outputs lay in the window.
    """
    with on_device(recv_memory, num_bytes=2 << 20):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        buffer = make_large_buffer(48, 1024)
        live = []
        for seed in range(num_dispatches):
            problem = make_problem(
                seed, [48] * num_ranks, num_experts=2 * num_ranks, num_topk=2, hidden=1024, masked_share=0.0
            )
            x, topk_idx, weights = problem.inputs(rank)
            sent = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=weights,
                num_experts=problem.num_experts,
                do_expand=seed % 3 == 0,
                num_sms=1 + seed % 8,
            )
            live.append((problem, sent))
        num_in_window = sum(is_in_window(buffer, sent[0]) for _, sent in live)
        assert 0 < num_in_window < num_dispatches, (num_in_window, context_of(buffer))
        sums = [buffer.combine(sent[0], sent[3], topk_weights=sent[2])[:2] for _, sent in reversed(live)]
        for (problem, sent), (combined, combined_weights) in zip(reversed(live), sums, strict=True):
            check_arrival(problem, rank, sent)
            check_combined(problem, rank, combined, combined_weights, do_expand=sent[3].do_expand)
        del live, sent, sums
        # What was full has room again.
        x, topk_idx, weights = problem.inputs(rank)
        sent = buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, num_experts=problem.num_experts)
        assert is_in_window(buffer, sent[0])
        check_arrival(problem, rank, sent)
        buffer.close()
    return num_in_window, num_dispatches


def check_two_of_each(recv_memory: str) -> None:
    """dispatch, dispatch, combine, combine, without a look at the results in between."""
    with on_device(recv_memory, num_bytes=64 << 20):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        buffer = make_large_buffer(40, 128)
        pending = []
        for round_idx in range(10):
            pair = []
            for place in range(2):
                problem = make_problem(
                    2 * round_idx + place,
                    [(round_idx * 7 + place * 13 + peer * 5) % 41 for peer in range(num_ranks)],
                    num_experts=2 * num_ranks,
                    num_topk=3,
                    num_max_tokens=40,
                    hidden=128,
                )
                x, topk_idx, weights = problem.inputs(rank)
                sent = buffer.dispatch(
                    x,
                    topk_idx=topk_idx,
                    topk_weights=weights,
                    num_experts=problem.num_experts,
                    num_max_tokens_per_rank=40,
                    do_expand=place == 1,
                    do_cpu_sync=round_idx % 2 == 0,
                )
                pair.append((problem, sent))
            for problem, sent in pair:
                pending.append((problem, sent, buffer.combine(sent[0], sent[3], topk_weights=sent[2])))
        for problem, sent, back in pending:
            check_arrival(problem, rank, sent, do_cpu_sync=sent[3].was_cpu_synced)
            check_combined(problem, rank, back[0], back[1], do_expand=sent[3].do_expand)
        buffer.close()


def check_outputs_outlive_their_buffer(recv_memory: str) -> None:
    """Received rows stay what they are when their buffer is closed or dropped, in any order of the ranks."""
    with on_device(recv_memory, num_bytes=8 << 20):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        problems = [
            make_problem(seed, [33] * num_ranks, num_experts=2 * num_ranks, num_topk=2, hidden=256) for seed in range(4)
        ]
        kept = []
        for problem in problems:
            x, topk_idx, weights = problem.inputs(rank)
            buffer = make_large_buffer(33, 256, explicitly_destroy=problem.salt % 2 == 0)
            sent = buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, num_experts=problem.num_experts)
            kept.append((problem, sent))
            # One rank lets go while another may not have come back from its call yet.
            if (rank + problem.salt) % 3 == 0:
                buffer.close()
                buffer.close()
            elif problem.salt % 2 == 0:
                buffer.destroy()
            del buffer
        gc.collect()
        # Others take the memory that was given back.
        later = make_large_buffer(33, 256)
        check_one(later, problems[0])
        for problem, sent in kept:
            check_arrival(problem, rank, sent)
        later.close()


def check_buffers_close_in_any_order(recv_memory: str) -> None:
    """Several buffers live at once; each rank closes or drops them in an order of its own."""
    with on_device(recv_memory, num_bytes=4 << 20):
        num_ranks, rank = dist.get_world_size(), dist.get_rank()
        problem = make_problem(5, [20] * num_ranks, num_experts=2 * num_ranks, num_topk=2)
        buffers = [make_large_buffer(20, 64) for _ in range(3)]
        for buffer in (*buffers, *reversed(buffers)):
            check_one(buffer, problem)
        # A buffer that is still used must be open on all ranks.
        last = buffers.pop(1)
        if rank % 2:
            buffers.reverse()
            buffers.pop().close()
        buffers.clear()
        check_one(last, problem)
        last.close()
        x, topk_idx, _ = problem.inputs(rank)
        with pytest.raises(ConfigError, match="the buffer must be open"):
            last.dispatch(x, topk_idx=topk_idx, num_experts=problem.num_experts)


def check_one(buffer: ElasticBuffer, problem: Problem) -> None:
    """One way there and back."""
    rank = dist.get_rank()
    x, topk_idx, weights = problem.inputs(rank)
    sent = buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, num_experts=problem.num_experts)
    combined, combined_weights, _ = buffer.combine(sent[0], sent[3], topk_weights=sent[2])
    check_arrival(problem, rank, sent)
    check_combined(problem, rank, combined, combined_weights, do_expand=False)
