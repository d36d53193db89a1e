"""What a buffer says of itself, its sizes and lifetime, and the ways in which dispatch and combine can be called."""

from __future__ import annotations

import contextlib
import io
import os
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

from deep_ep_core.env import reset_env
from deep_ep_core.errors import ConfigError
from deep_ep_core.stream import NoEventError
from deep_ep_ep import (
    ElasticBuffer,
    EventHandle,
    EventOverlap,
    get_logical_domain_size,
    get_physical_domain_size,
)
from deep_ep_ep.sizing import BufferShape, buffer_size_hint, dispatch_buffer_bytes

MIB = 1 << 20
# 2^24 and 1 add up to 2^24 in float32: what is added later is lost.
LARGE = 2.0**24

ATTRIBUTES = (
    "rank_idx",
    "num_ranks",
    "allow_hybrid_mode",
    "allow_multiple_reduction",
    "prefer_overlap_with_compute",
    "deterministic",
    "nccl_comm_handle",
    "num_bytes",
    "num_max_tokens_per_rank",
    "num_allocated_qps",
    "explicitly_destroy",
    "num_scaleout_ranks",
    "num_scaleup_ranks",
    "scaleout_rank_idx",
    "scaleup_rank_idx",
    "num_rdma_ranks",
    "num_nvlink_ranks",
    "sl_idx",
)


def open_buffer(group: dist.ProcessGroup | None = None, **options: Any) -> ElasticBuffer:
    return ElasticBuffer(group, **{"num_bytes": 64 * MIB, "num_cpu_timeout_secs": 60, **options})


def route(num_tokens: int, num_experts: int, num_topk: int, *, seed: int = 0) -> torch.Tensor:
    """Distinct experts for each token of this rank, one entry in six masked."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    topk_idx = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :num_topk].contiguous()
    topk_idx[torch.rand(topk_idx.shape, generator=generator) < 1 / 6] = -1
    return topk_idx


def num_copies(topk_idx: torch.Tensor, num_local_experts: int) -> torch.Tensor:
    """`[num_tokens, 1]`: to how many ranks each token goes."""
    ranks = [{e // num_local_experts for e in experts if e >= 0} for experts in topk_idx.tolist()]
    return torch.tensor([[len(each)] for each in ranks]).view(-1, 1)


# What it says of itself


def describe(options: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a new buffer, and what its methods and the module's functions say of the domains."""
    group = dist.group.WORLD
    buffer = open_buffer(group, **options)
    assert buffer.group is group
    assert buffer.runtime is not None
    told = {name: getattr(buffer, name) for name in ATTRIBUTES}
    told["physical"] = buffer.get_physical_domain_size()
    told["logical"] = buffer.get_logical_domain_size()
    told["physical of the group"] = get_physical_domain_size(group)
    told["logical of the group"] = get_logical_domain_size(group)
    told["logical of the group, direct"] = get_logical_domain_size(group, allow_hybrid_mode=False)
    buffer.close()
    return told


def estimates(options: dict[str, Any], calls: list[dict[str, Any]], num_sms: list[int]) -> tuple[list[int], list[int]]:
    """Answers of `get_theoretical_num_sms` to calls, and of `get_theoretical_num_qps` to SM counts."""
    buffer = open_buffer(**options)
    return (
        [buffer.get_theoretical_num_sms(**call) for call in calls],
        [buffer.get_theoretical_num_qps(count) for count in num_sms],
    )


def states_in_repr() -> list[str]:
    """The text of a buffer that is open, closed by its block, closed again, and destroyed twice."""
    with open_buffer(num_bytes=2 * MIB) as buffer:
        texts = [repr(buffer)]
        assert buffer.runtime is not None
    texts.append(repr(buffer))
    assert buffer.runtime is None
    buffer.close()
    texts.append(repr(buffer))
    destroyed = open_buffer(num_bytes=2 * MIB, explicitly_destroy=True)
    destroyed.destroy()
    destroyed.destroy()
    assert destroyed.runtime is None
    assert destroyed.nccl_comm_handle is None
    texts.append(repr(destroyed))
    for call in (buffer.barrier, destroyed.barrier):
        with pytest.raises(ConfigError, match="must be open"):
            call()
    return texts


def close_when_the_block_raises() -> None:
    with pytest.raises(KeyError, match="mine"), open_buffer() as buffer:
        raise KeyError("mine")
    assert buffer.runtime is None


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Settings of this process for the length of the block."""
    before = dict(os.environ)
    os.environ.update(variables)
    reset_env()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        reset_env()


def service_levels() -> tuple[int, int, int, int]:
    """The default, one asked for, and the environment's word against both."""
    default, asked = open_buffer().sl_idx, open_buffer(sl_idx=5).sl_idx
    with environment(EP_OVERRIDE_RDMA_SL="0"):
        return default, asked, open_buffer().sl_idx, open_buffer(sl_idx=5).sl_idx


def debug_output() -> tuple[list[str], list[str]]:
    """Lines that this rank prints when a buffer is made, and in three dispatches with two shapes of routing."""
    x = torch.ones(4, 16)
    made, used = io.StringIO(), io.StringIO()
    with environment(EP_BUFFER_DEBUG="1"):
        with contextlib.redirect_stdout(made):
            buffer = open_buffer(num_max_tokens_per_rank=4)
        with contextlib.redirect_stdout(used):
            for num_topk in (1, 1, 2):
                buffer.dispatch(x, topk_idx=route(4, 8, num_topk), num_experts=8)
    with contextlib.redirect_stdout(made):
        open_buffer()
    return made.getvalue().splitlines(), used.getvalue().splitlines()


# Sizes


def check_size_hint(is_two_nodes: bool) -> None:
    """The hint is `sizing`'s number for the group's domains, is taken as `num_bytes`, and is what None takes."""
    group = dist.group.WORLD
    num_ranks = dist.get_world_size()
    for arguments in (
        {"num_max_tokens_per_rank": 128, "hidden": 256},
        {"num_max_tokens_per_rank": 300, "hidden": 512, "num_topk": 6},
        {"num_max_tokens_per_rank": 300, "hidden": 512, "num_topk": 6, "use_fp8_dispatch": True},
        {"num_max_tokens_per_rank": 128, "hidden": 256, "num_topk": 8, "allow_hybrid_mode": False},
        {"num_max_tokens_per_rank": 128, "hidden": 256, "num_topk": 8, "allow_multiple_reduction": False},
    ):
        is_hybrid = is_two_nodes and arguments.get("allow_hybrid_mode", True)
        shape = BufferShape(
            num_scaleout_ranks=2 if is_hybrid else 1,
            num_scaleup_ranks=num_ranks // 2 if is_hybrid else num_ranks,
            is_scaleup_nvlink=is_hybrid or not is_two_nodes,
            **{name: value for name, value in arguments.items() if name != "allow_hybrid_mode"},
        )
        hint = ElasticBuffer.get_buffer_size_hint(group, **arguments)
        assert hint == buffer_size_hint(shape), arguments
        assert hint % (2 * MIB) == 0
        assert ElasticBuffer.get_buffer_size_hint(None, **arguments) == hint
        with ElasticBuffer(group, num_cpu_timeout_secs=60, **arguments) as buffer:
            assert buffer.num_bytes == hint, arguments
        with ElasticBuffer(group, num_bytes=hint, num_cpu_timeout_secs=60) as buffer:
            assert buffer.num_bytes == hint


def check_hinted_buffer_is_large_enough() -> None:
    """A buffer of the hinted size takes the largest calls that it was sized for, FP8 scales included."""
    for use_fp8 in (False, True):
        for options in ({}, {"allow_hybrid_mode": False}, {"allow_multiple_reduction": False}):
            hint = ElasticBuffer.get_buffer_size_hint(None, 64, 512, 4, use_fp8, **options)
            with ElasticBuffer(None, num_bytes=hint, num_cpu_timeout_secs=60, **options) as buffer:
                rows = torch.ones(64, 512, dtype=torch.uint8 if use_fp8 else torch.bfloat16)
                x = (rows, torch.ones(64, 16)) if use_fp8 else rows
                *_, handle, _ = buffer.dispatch(x, topk_idx=route(64, 8, 4), num_experts=8, num_max_tokens_per_rank=64)
                buffer.combine(torch.ones(handle.num_recv_tokens, 512, dtype=torch.bfloat16), handle)


def fit_exactly() -> dict[str, str]:
    """A dispatch that needs every byte of 2 MiB runs; each that needs a little more is refused, in these words.

    On 4 ranks of one domain: 4 * 512 records of 992 bytes of payload and 32 of metadata (top-2: 28, rounded up).
    """
    shape = BufferShape(
        num_scaleout_ranks=1,
        num_scaleup_ranks=4,
        is_scaleup_nvlink=True,
        num_max_tokens_per_rank=512,
        hidden=496,
        num_topk=2,
    )
    assert dispatch_buffer_bytes(shape) == 2 * MIB
    buffer = open_buffer(num_bytes=2 * MIB)
    topk_idx = route(3, 8, 2)

    def dispatch(hidden: int = 496, num_max_tokens_per_rank: int = 512, topk_idx: torch.Tensor = topk_idx) -> None:
        x = torch.ones(3, hidden, dtype=torch.bfloat16)
        recv_x, _, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, num_experts=8, num_max_tokens_per_rank=num_max_tokens_per_rank
        )
        buffer.combine(recv_x, handle)

    dispatch()
    # A payload counts in steps of 32 bytes, so 16 bytes less is the same size.
    dispatch(hidden=488)
    refused = {}
    for name, change in {
        "16 bytes more a row": {"hidden": 504},
        "one token more": {"num_max_tokens_per_rank": 513},
        "one entry more": {"topk_idx": route(3, 8, 3)},
    }.items():
        with pytest.raises(ConfigError) as caught:
            dispatch(**change)
        refused[name] = str(caught.value)
    # Nothing was sent, so the buffer goes on working.
    dispatch()
    return refused


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
