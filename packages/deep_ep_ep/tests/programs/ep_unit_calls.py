"""The ways in which barrier, dispatch and combine can be called: events, modes, groups, and the worked example."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ep_cases import (
    Case,
    Expected,
    as_bytes,
    assert_bits_equal,
    check_handle,
    check_token_major,
    make_buffer,
    with_ranks,
)
from ep_unit_buffer import num_copies, open_buffer, route

from deep_ep_core.errors import ConfigError
from deep_ep_core.stream import NoEventError
from deep_ep_ep import ElasticBuffer, EventHandle, EventOverlap

# 2^24 and 1 add up to 2^24 in float32: what is added later is lost.
LARGE = 2.0**24


# Events and barriers


def check_barrier_forms() -> None:
    """Every argument is accepted by position and by name, as a boolean and as a number."""
    buffer = open_buffer()
    for arguments in ((), (True,), (False, True), (True, False, True), (0, 1, 0)):
        assert buffer.barrier(*arguments) is None
    for use_comm_stream in (True, False):
        for with_cpu_sync in (0, 1):
            for sequential in (True, False):
                buffer.barrier(use_comm_stream=use_comm_stream, with_cpu_sync=with_cpu_sync, sequential=sequential)


def check_barrier_waits_for_all() -> None:
    """No rank passes the barrier before each has announced itself."""
    buffer = open_buffer()
    # A name of this run's own: the store outlives it.
    run_name = [uuid.uuid4().hex]
    dist.broadcast_object_list(run_name)
    store = dist.distributed_c10d._get_default_store()
    for round_idx in range(5):
        store.add(f"{run_name[0]}/{round_idx}", 1)
        buffer.barrier()
        assert store.add(f"{run_name[0]}/{round_idx}", 0) == dist.get_world_size()


def check_events() -> None:
    """An asynchronous call gives an event that can be waited for, hooked, passed on and released; others give none."""
    buffer = open_buffer()
    x, topk_idx = torch.randn(5, 16), route(5, 8, 3)
    arguments = {"topk_idx": topk_idx, "num_experts": 8, "num_max_tokens_per_rank": 8}
    recv_x, _, _, handle, event = buffer.dispatch(x, **arguments)
    assert isinstance(event, EventOverlap)
    assert event.event is None
    with pytest.raises(AssertionError, match="without async_with_compute_stream=True"):
        event.current_stream_wait()
    with pytest.raises(NoEventError):
        event.current_stream_wait()
    with event:
        pass

    captured = buffer.capture()
    assert isinstance(captured, EventHandle)
    captured.current_stream_wait()
    assert isinstance(ElasticBuffer.capture(), EventHandle)
    for previous in (captured, EventOverlap(captured)):
        again, _, _, _, event = buffer.dispatch(
            x,
            **arguments,
            previous_event=previous,
            previous_event_before_epilogue=previous,
            async_with_compute_stream=True,
            allocate_on_comm_stream=True,
        )
        assert isinstance(event.event, EventHandle)
        calls: list[str] = []
        event.register_hook_after_wait(lambda calls=calls: calls.append("hook"))
        with event(release_handle=True):
            assert calls == []
        assert calls == ["hook"]
        assert event.event is None
        assert_bits_equal(again, recv_x, "the same dispatch with events")
        combined, _, event = buffer.combine(
            again, handle, previous_event=previous, async_with_compute_stream=1, allocate_on_comm_stream=1
        )
        event.current_stream_wait(release_handle=True)
        assert event.event is None
        assert torch.equal(combined, x * num_copies(topk_idx, 8 // dist.get_world_size()))
    assert buffer.get_comm_stream() == buffer.get_comm_stream()


# How calls can be made


def check_deterministic_is_the_same() -> None:
    """`deterministic=True` is accepted and gives the same bytes: results are deterministic anyway."""
    case = with_ranks(Case(num_tokens=(12, 0, 33, 7), num_biases=1))
    expected, rank = Expected.of(case), dist.get_rank()
    sent = expected.sent[rank]
    results = []
    for deterministic in (False, True):
        buffer = make_buffer(case, deterministic=deterministic)
        assert buffer.deterministic is deterministic
        recv_x, recv_idx, _, handle, event = buffer.dispatch(
            sent.x, topk_idx=sent.topk_idx, num_experts=case.num_experts, async_with_compute_stream=True
        )
        event.current_stream_wait()
        combined, _, _ = buffer.combine(recv_x, handle)
        results.append([recv_x, recv_idx, handle.recv_src_metadata, handle.dst_buffer_slot_idx, combined])
        buffer.destroy()
    for plain, deterministic_result in zip(*results, strict=True):
        assert torch.equal(as_bytes(plain), as_bytes(deterministic_result))


def check_torch_deterministic_mode() -> None:
    """Under torch's own deterministic algorithms, which also fill new memory with NaN, results are right."""
    case = with_ranks(Case(num_tokens=(12, 0, 33, 7), expert_alignment=8))
    expected, rank = Expected.of(case), dist.get_rank()
    sent = expected.sent[rank]
    buffer = make_buffer(case)
    torch.use_deterministic_algorithms(True)
    try:
        for do_cpu_sync in (True, False):
            for do_expand in (False, True):
                *received, handle, _ = buffer.dispatch(
                    sent.x,
                    topk_idx=sent.topk_idx,
                    topk_weights=sent.topk_weights,
                    num_experts=case.num_experts,
                    expert_alignment=case.expert_alignment,
                    do_cpu_sync=do_cpu_sync,
                    do_expand=do_expand,
                )
                buffer.combine(received[0], handle)
                check_handle(expected, rank, handle, buffer, do_cpu_sync=do_cpu_sync)
                if not do_expand:
                    num_rows = None if do_cpu_sync else case.num_ranks * case.num_max_tokens_per_rank
                    check_token_major(expected, rank, *received, num_rows=num_rows)
    finally:
        torch.use_deterministic_algorithms(False)
    buffer.destroy()


def sm_counts() -> dict[str, int]:
    """The SM count that each handle holds, and the model's own answer."""
    buffer = open_buffer(num_max_tokens_per_rank=8)
    x, topk_idx = torch.ones(4, 16), route(4, 8, 2)
    recv_x, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=8)
    asked = buffer.dispatch(x, topk_idx=topk_idx, num_experts=8, num_sms=6)[3]
    counts = {"default": handle.num_sms, "asked": asked.num_sms, "model": buffer.get_theoretical_num_sms(8, 2)}
    for kept in (handle, asked):
        before = kept.num_sms
        with counts_given_to_backend(buffer) as given:
            assert buffer.dispatch(x, handle=kept, num_sms=0)[3] is kept
            assert buffer.dispatch(x, handle=kept, num_sms=2)[3] is kept
            buffer.combine(recv_x, kept)
            buffer.combine(recv_x, kept, num_sms=8)
        assert given == [before, 2, before, 8]
        assert kept.num_sms == before
    no_overlap = open_buffer(num_max_tokens_per_rank=8, prefer_overlap_with_compute=False)
    counts["no overlap"] = no_overlap.dispatch(x, topk_idx=topk_idx, num_experts=8)[3].num_sms
    # More entries than experts: no more than all experts can be hit.
    wide = torch.full((4, 12), -1)
    wide[:, 11] = 0
    counts["more entries than experts"] = buffer.dispatch(x, topk_idx=wide, num_experts=8)[3].num_sms
    counts["model of all experts"] = buffer.get_theoretical_num_sms(8, 8)
    return counts


@contextlib.contextmanager
def counts_given_to_backend(buffer: ElasticBuffer) -> Iterator[list[int]]:
    """The SM counts of the calls that reach the backend inside the block."""
    given: list[int] = []
    backend = buffer.runtime
    assert backend is not None
    with contextlib.ExitStack() as stack:
        for name in ("dispatch", "combine"):
            call = getattr(backend, name)

            def noting(args: Any, scope: Any, call: Callable[..., Any] = call) -> Any:
                given.append(args.num_sms)
                return call(args, scope)

            stack.enter_context(mock.patch.object(backend, name, noting))
        yield given


def check_no_graph_is_built() -> None:
    """Inputs that need gradients, and inference mode on either side, change nothing; no result needs gradients."""
    buffer = open_buffer(num_max_tokens_per_rank=8)
    x, topk_idx, weights = torch.randn(5, 16), route(5, 8, 3), torch.rand(5, 3)
    copies = num_copies(topk_idx, 8 // dist.get_world_size())
    handles = []
    for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
        for do_expand in (False, True):
            with mode():
                own_x, own_weights = (
                    value.clone().requires_grad_(mode is not torch.inference_mode) for value in (x, weights)
                )
                stats = torch.zeros(8 // dist.get_world_size(), dtype=torch.int32)
                recv_x, _, recv_weights, handle, _ = buffer.dispatch(
                    own_x, topk_idx, own_weights, stats, 8, do_expand=do_expand, do_zero_padding=do_expand
                )
                assert not recv_x.requires_grad
                assert not recv_weights.requires_grad
                handles.append((recv_x, recv_weights, handle, do_expand))
    for recv_x, recv_weights, handle, do_expand in handles:
        # Made in one mode, used in all.
        for mode in (contextlib.nullcontext, torch.no_grad, torch.inference_mode):
            with mode():
                bias = torch.zeros(5, 16, requires_grad=mode is not torch.inference_mode)
                combined, combined_weights, _ = buffer.combine(recv_x, handle, recv_weights, bias)
                assert not combined.requires_grad
                assert combined.grad_fn is None
                assert torch.equal(combined_weights, weights.masked_fill(topk_idx < 0, 0))
                if not do_expand:
                    assert torch.equal(combined, x * copies)


def check_groups() -> None:
    """Subgroups work among themselves, at once and with groups that overlap; outsiders are told that they are."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    assert num_ranks == 4
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    tail = dist.new_group([1, 2, 3])
    own_half = halves[rank % 2]

    def round_trip(buffer: ElasticBuffer, *, seed: int) -> None:
        topk_idx = route(5, 12, 3, seed=seed)
        x = torch.randn(5, 16, generator=torch.Generator().manual_seed(rank))
        recv_x, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=12, num_max_tokens_per_rank=8)
        sources = handle.recv_src_metadata[:, 0] // 8
        assert bool((sources < buffer.num_ranks).all())
        combined, _, _ = buffer.combine(recv_x, handle)
        assert torch.equal(combined, x * num_copies(topk_idx, 12 // buffer.num_ranks))

    world, half = open_buffer(None), open_buffer(own_half)
    assert world.group is dist.group.WORLD
    assert (world.num_ranks, world.rank_idx) == (4, rank)
    assert (half.num_ranks, half.rank_idx) == (2, rank // 2)
    assert half.group is own_half
    for seed in range(3):
        round_trip(half, seed=seed)
        round_trip(world, seed=seed)
    if rank == 0:
        with pytest.raises(ConfigError, match="members of its group only"):
            open_buffer(tail)
    else:
        with open_buffer(tail) as part:
            assert (part.num_ranks, part.rank_idx) == (3, rank - 1)
            round_trip(part, seed=4)
    round_trip(world, seed=5)


def check_several_buffers_of_one_group() -> None:
    """Buffers of one group do not disturb each other, and a handle belongs to the buffer that made it."""
    buffers = [open_buffer(num_max_tokens_per_rank=8) for _ in range(3)]
    assert len({buffer.id for buffer in buffers}) == 3
    xs = [torch.randn(5, 16) for _ in buffers]
    routes = [route(5, 8, 3, seed=seed) for seed in range(3)]
    results = [
        buffer.dispatch(x, topk_idx=topk_idx, num_experts=8)
        for buffer, x, topk_idx in zip(buffers, xs, routes, strict=True)
    ]
    for idx in (2, 0, 1):
        recv_x, _, _, handle, _ = results[idx]
        combined, _, _ = buffers[idx].combine(recv_x, handle)
        assert torch.equal(combined, xs[idx] * num_copies(routes[idx], 8 // dist.get_world_size()))
        with pytest.raises(ConfigError, match="dispatch of this buffer"):
            buffers[idx - 1].combine(recv_x, handle)
    # Closing one leaves the others open.
    buffers[0].close()
    recv_x, _, _, handle, _ = results[2]
    buffers[2].combine(recv_x, handle)


# The worked example: two ranks, four experts (two a rank), top-3, M = 4; rank 0 has three tokens, rank 1 has none.


def worked_example() -> dict[str, Any]:
    """All that this rank is given, as lists."""
    is_sender = dist.get_rank() == 0
    topk_idx = torch.tensor([[0, 3, 1], [2, -1, 3], [-1, -1, -1]])
    weights = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    # Each row holds its number.
    x = torch.tensor([[10.0], [11.0], [12.0]]).repeat(1, 4)
    if not is_sender:
        topk_idx, weights, x = topk_idx[:0], weights[:0], x[:0]
    buffer = open_buffer(num_max_tokens_per_rank=4)
    told: dict[str, Any] = {}
    for layout, do_expand in (("token-major", False), ("expert-major", True)):
        stats = torch.zeros(2, dtype=torch.int32)
        recv_x, recv_idx, recv_weights, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            cumulative_local_expert_recv_stats=stats,
            num_experts=4,
            expert_alignment=4,
            do_expand=do_expand,
            do_zero_padding=do_expand,
        )
        assert handle.token_metadata_at_forward is None
        assert handle.channel_linked_list is None
        assert handle.cached_recv_src_metadata_before_sort is None
        told[layout] = {
            "rows": recv_x[:, 0].tolist(),
            "topk_idx": None if recv_idx is None else recv_idx.tolist(),
            "weights": [[round(w, 6) for w in row] for row in recv_weights.view(len(recv_x), -1).tolist()],
            "num_recv_tokens": handle.num_recv_tokens,
            "num_expanded_tokens": handle.num_expanded_tokens,
            "list": handle.num_recv_tokens_per_expert_list,
            "unaligned": handle.num_unaligned_recv_tokens_per_expert.tolist(),
            "stats": stats.tolist(),
            "psum rank": handle.psum_num_recv_tokens_per_scaleup_rank.tolist(),
            "psum expert": handle.psum_num_recv_tokens_per_expert.tolist(),
            "metadata": handle.recv_src_metadata.tolist(),
            "slots": handle.dst_buffer_slot_idx.tolist(),
        }
        # Outputs whose sum depends on its order; rows of padding hold NaN.
        outputs = torch.full((len(recv_x), 4), float("nan"))
        if do_expand:
            outputs[[0, 4]] = torch.tensor([[1.0], [-LARGE]]) if is_sender else torch.tensor([[7.0], [LARGE]])
            if not is_sender:
                outputs[5] = 8.0
            back_weights = torch.arange(8.0) + (100 if is_sender else 200)
        else:
            outputs[:] = torch.tensor([[-LARGE]]) if is_sender else torch.tensor([[LARGE], [5.0]])
            back_weights = torch.tensor([[1.0, 2, 3]]) if is_sender else torch.tensor([[10.0, 20, 30], [40, 50, 60]])
        bias = None if do_expand else torch.ones(len(x), 4)
        combined, combined_weights, _ = buffer.combine(outputs, handle, topk_weights=back_weights, bias=bias)
        told[layout] |= {"combined": combined[:, 0].tolist(), "combined weights": combined_weights.tolist()}
    return told
