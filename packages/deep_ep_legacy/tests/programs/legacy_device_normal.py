"""Normal calls of the device backend on ranks with GPUs, each compared with the collective backend to the bit."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from legacy_frameworks_problem import on_device_backend

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError, TopologyError
from deep_ep_legacy import Buffer, Config, IntranodeHandle
from deep_ep_legacy.device import normal

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
LAYOUT = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "num_tokens_per_expert", "is_token_in_rank")


def use_gpu() -> None:
    """Several ranks may share one GPU."""
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def buffers(num_bytes: int = 1 << 24, **options: Any) -> Iterator[tuple[Buffer, Buffer]]:
    """A buffer of the device backend, and one of the collective backend."""
    use_gpu()
    group = dist.group.WORLD
    device = Buffer(group, num_bytes, explicitly_destroy=True, backend="device", **options)
    assert "device backend" in repr(device)
    yield device, Buffer(group, num_bytes, backend="collective")
    torch.cuda.synchronize()
    dist.barrier()
    device.destroy()


@contextlib.contextmanager
def small_stage(num_bytes: int) -> Iterator[None]:
    """Buffers with stages of so few bytes that calls take several rounds."""
    before, normal.MIN_STAGE_BYTES = normal.MIN_STAGE_BYTES, num_bytes
    try:
        yield
    finally:
        normal.MIN_STAGE_BYTES = before


@dataclass(frozen=True, kw_only=True)
class Case:
    """A dispatch and a combine."""

    num_tokens: tuple[int, ...]  # the n-th rank has the n-th of these, and round
    hidden: int = 64
    num_topk: int = 3
    num_local_experts: int = 2
    kind: str = "bf16"  # or fp8, packed, float32
    index_dtype: torch.dtype = torch.int64
    has_topk: bool = True
    num_biases: int = 0
    alignment: int = 1
    num_sms: int = 8
    spread: int = 0  # of how many ranks experts are chosen; 0: of all
    extra_worst: int = 3
    seed: int = 0


def make_inputs(case: Case) -> dict[str, Any]:
    """The arguments of this rank, on its GPU. Values are unlike each other, by rank and token."""
    use_gpu()
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(1000 * case.seed + rank)
    num = case.num_tokens[rank % len(case.num_tokens)]
    num_experts = case.num_local_experts * num_ranks
    x = torch.randn(num, case.hidden, generator=generator)
    scales = torch.randn(num, 5, generator=generator)
    num_chosen = case.num_local_experts * (case.spread or num_ranks)
    order = torch.rand(num, num_chosen, generator=generator).argsort(1)[:, : case.num_topk]
    topk = torch.where(torch.rand(order.shape, generator=generator) < 0.3, -1, order)
    topk = torch.nn.functional.pad(topk, (0, case.num_topk - topk.size(1)), value=-1)
    weights = torch.rand(num, case.num_topk, generator=generator)
    biases = [torch.randn(num, case.hidden, generator=generator).to(BF16).cuda() for _ in range(case.num_biases)]
    rows: Any = x.cuda() if case.kind == "float32" else x.to(BF16).cuda()
    if case.kind in ("fp8", "packed"):
        scales = scales.view(torch.int32) if case.kind == "packed" else scales
        # Column by column in memory, as quantisation kernels write them.
        rows = (x.to(FP8).cuda(), scales.t().contiguous().t().cuda().t().contiguous().t())
    return {
        "x": rows,
        "topk_idx": topk.to(case.index_dtype).cuda(),
        "topk_weights": weights.cuda(),
        "num_experts": num_experts,
        "biases": tuple(biases),
        "num_worst_tokens": sum(case.num_tokens[i % len(case.num_tokens)] for i in range(num_ranks)) + case.extra_worst,
    }


def same(name: str, actual: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(actual, torch.Tensor), name
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), (name, actual.shape, expected.shape)
        assert actual.is_contiguous(), name
        assert actual.device == expected.device, name
        # As integers of their size: NaN is like NaN.
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
        bits = actual.view(integers), expected.view(integers)
        if not torch.equal(*bits):
            num_wrong = int((bits[0] != bits[1]).sum())
            raise AssertionError(f"{name}: {num_wrong} of {bits[0].numel()} elements differ: {actual} {expected}")
        return
    assert actual == expected, (name, actual, expected)


def parts_of(recv: Any) -> tuple[torch.Tensor, ...]:
    return recv if isinstance(recv, tuple) else (recv,)


def compare(pair: tuple[Buffer, Buffer], case: Case) -> None:
    """Layout, dispatch, cached dispatch, combine, all of it again for the worst case: every result, and the handles."""
    given = make_inputs(case)
    config = Config(case.num_sms)
    both = [run_calls(buffer, case, given, config, num_worst=0) for buffer in pair]
    for name, expected in both[1].items():
        same(name, both[0][name], expected)
    if not case.has_topk:
        return
    worst = run_calls(pair[0], case, given, config, num_worst=given["num_worst_tokens"])
    num = len(both[1]["recv 0"])
    for name, expected in both[1].items():
        actual = worst[name]
        if name.startswith(("recv ", "cached ", "topk", "handle recv_src_idx")):
            assert len(actual) == given["num_worst_tokens"], name
            if name in ("topk_idx", "handle recv_src_idx"):
                assert (actual[num:] == -1).all(), name
            actual = actual[:num]
        same(f"worst {name}", actual, [] if name == "counts" else expected)


def run_calls(buffer: Buffer, case: Case, given: dict[str, Any], config: Config, *, num_worst: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    layout = dict(zip(LAYOUT, buffer.get_dispatch_layout(given["topk_idx"], given["num_experts"])[:4], strict=True))
    results.update(layout)
    routed = {"topk_idx": given["topk_idx"], "topk_weights": given["topk_weights"]} if case.has_topk else {}
    recv, topk_idx, topk_weights, counts, handle, _ = buffer.dispatch(
        given["x"],
        **layout,
        **routed,
        expert_alignment=case.alignment,
        num_worst_tokens=num_worst,
        config=config,
    )
    results.update({f"recv {i}": part for i, part in enumerate(parts_of(recv))})
    results.update({"topk_idx": topk_idx, "topk_weights": topk_weights, "counts": counts})
    assert isinstance(handle, IntranodeHandle)
    before = [item.clone() for item in handle]
    results.update({f"handle {name}": item for name, item in zip(handle._fields, before, strict=True)})
    again = buffer.dispatch(given["x"], handle=tuple(handle), config=config)
    assert again[1:5] == (None, None, None, None)
    results.update({f"cached {i}": part for i, part in enumerate(parts_of(again[0]))})
    num_rows = len(handle.recv_src_idx)
    generator = torch.Generator().manual_seed(77 * case.seed + dist.get_rank())
    # As many as any call needs, so that all calls take the same.
    outputs = torch.randn(given["num_worst_tokens"], case.hidden, generator=generator).to(BF16).cuda()[:num_rows]
    bias = None if not given["biases"] else given["biases"] if len(given["biases"]) == 2 else given["biases"][0]
    combined, _, _ = buffer.combine(outputs, handle, bias=bias, config=config)
    results["combined"] = combined
    if case.has_topk:
        combined, weights, _ = buffer.combine(outputs, handle, topk_weights=topk_weights, config=config)
        results.update({"combined with weights": combined, "combined weights": weights})
    torch.cuda.synchronize()
    assert all(torch.equal(old, new) for old, new in zip(before, handle, strict=True)), "a handle is not changed"
    return results


CASES = {
    "few": Case(num_tokens=(33,)),
    "uneven": Case(num_tokens=(0, 7, 64, 1, 31), index_dtype=torch.int32, seed=1, alignment=4),
    "none": Case(num_tokens=(0,), seed=2),
    "one": Case(num_tokens=(1,), num_topk=1, num_local_experts=1, seed=3),
    "all from one, wide": Case(num_tokens=(640, 0), num_topk=8, num_local_experts=4, seed=4, num_biases=1),
    "all to one": Case(num_tokens=(129, 32), spread=1, seed=5, num_biases=2),
    "fp8": Case(num_tokens=(65, 32), kind="fp8", hidden=128, seed=6, alignment=128),
    "packed": Case(num_tokens=(65, 32), kind="packed", hidden=7168, seed=7),
    "float32 without topk": Case(num_tokens=(40, 5), kind="float32", has_topk=False, seed=8),
    "many": Case(num_tokens=(4097, 4100), hidden=256, num_topk=8, num_local_experts=4, seed=9, num_biases=2),
    "large rows": Case(num_tokens=(50, 3), hidden=7176, num_topk=4, seed=10, num_sms=20),
    "one SM": Case(num_tokens=(70, 9), seed=11, num_sms=0, num_local_experts=40),
}


def check_cases() -> int:
    with buffers() as pair:
        for name, case in CASES.items():
            try:
                compare(pair, case)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
    return len(CASES)


def check_cpu_tensors() -> None:
    """Tensors on the CPU go by messages, as on the collective backend; then kernels again."""
    with buffers() as pair:
        x = torch.arange(8, dtype=BF16).view(1, 8) + 16 * dist.get_rank()
        topk_idx = torch.tensor([[(dist.get_rank() + 1) % dist.get_world_size()]])
        layout = dict(zip(LAYOUT, pair[0].get_dispatch_layout(topk_idx, dist.get_world_size())[:4], strict=True))
        recv, _, _, _, handle, _ = pair[0].dispatch(x, **layout)
        assert recv.device.type == "cpu"
        same("there and back", pair[0].combine(recv, handle)[0], x)
        compare(pair, CASES["few"])


def check_rounds() -> None:
    """A stage of a few tokens: the same results, in many rounds."""
    num_ranks = dist.get_world_size()
    for num_bytes in (1 << 11, 1 << 14, 1 << 16):
        with small_stage(num_bytes * num_ranks), buffers(0) as pair:
            for name in ("few", "uneven", "none", "all from one, wide", "all to one", "fp8"):
                try:
                    compare(pair, CASES[name])
                except AssertionError as error:
                    raise AssertionError(f"{name}, {num_bytes}: {error}") from error


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    num_local = draw.choice([1, 2, 5, 16])
    return Case(
        num_tokens=tuple(draw.choice([0, 1, 5, 31, 32, 33, 64, 100, 257, 513]) for _ in range(draw.randint(1, 8))),
        hidden=draw.choice([16, 48, 128, 512, 1040]) * (1 if draw.random() < 0.5 else 2),
        num_topk=draw.randint(1, 8),
        num_local_experts=num_local,
        kind=draw.choice(["bf16", "bf16", "fp8", "packed", "float32"]),
        index_dtype=draw.choice([torch.int64, torch.int32]),
        has_topk=draw.random() < 0.8,
        num_biases=draw.randint(0, 2),
        alignment=draw.choice([1, 4, 128]),
        num_sms=draw.choice([1, 2, 6, 20]),
        spread=draw.choice([0, 0, 1]),
        seed=seed,
    )


def check_random_rounds(num: int, seconds: float) -> int:
    """Random cases on one buffer until either is used up; how many there were, the same on all ranks."""
    end, num_done = time.monotonic() + seconds, 0
    with small_stage(1 << 18), buffers(0) as pair:
        for seed in range(num):
            has_time = torch.tensor([int(time.monotonic() < end)])
            dist.broadcast(has_time, 0)
            if not has_time.item():
                break
            case = random_case(seed)
            try:
                compare(pair, case)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from error
            num_done += 1
    return num_done


def routing_of(buffer: Buffer, given: dict[str, Any]) -> dict[str, Any]:
    layout = dict(zip(LAYOUT, buffer.get_dispatch_layout(given["topk_idx"], given["num_experts"])[:4], strict=True))
    return {**layout, "topk_idx": given["topk_idx"], "topk_weights": given["topk_weights"]}


def check_streams() -> None:
    """Asynchronous calls that follow each other's events, and work on the current stream meanwhile."""
    case = Case(num_tokens=(300, 17), hidden=1024, num_topk=4, seed=20)
    given = make_inputs(case)
    with buffers() as (device, collective):
        routed = routing_of(collective, given)
        recv, _, _, _, handle, _ = collective.dispatch(given["x"], **routed)
        expected, _, _ = collective.combine((recv.float() * 2).to(BF16), handle)
        streams = {"async_finish": True, "allocate_on_comm_stream": True}
        for _ in range(20):
            *layout, event = device.get_dispatch_layout(
                given["topk_idx"], given["num_experts"], previous_event=Buffer.capture(), **streams
            )
            routed = {**dict(zip(LAYOUT, layout, strict=True)), "topk_weights": given["topk_weights"]}
            recv, _, _, _, handle, event = device.dispatch(
                given["x"], **routed, topk_idx=given["topk_idx"], previous_event=event, **streams
            )
            # Keeps the caller's stream busy, so that a missing wait would be seen.
            torch.randn(1 << 20, device="cuda").sort()
            event.current_stream_wait()
            doubled = (recv.float() * 2).to(BF16)
            combined, _, event = device.combine(doubled, handle, previous_event=Buffer.capture(), **streams)
            del doubled, recv
            torch.randn(1 << 20, device="cuda").sort()
            with event:
                pass
            same("combined", combined, expected)


def check_graph() -> None:
    """Dispatch with a bound, cached dispatch and combine in a CUDA graph, replayed with other inputs."""
    cases = [Case(num_tokens=(64,), hidden=256, num_topk=4, seed=seed) for seed in range(30, 34)]
    given = [make_inputs(case) for case in cases]
    bound = given[0]["num_worst_tokens"]
    with buffers() as (device, collective):
        x, idx, weights = (given[0][name].clone() for name in ("x", "topk_idx", "topk_weights"))

        def step() -> tuple[torch.Tensor, ...]:
            layout = dict(zip(LAYOUT, device.get_dispatch_layout(idx, given[0]["num_experts"])[:4], strict=True))
            recv, recv_idx, recv_weights, _, handle, _ = device.dispatch(
                x, **layout, topk_idx=idx, topk_weights=weights, num_worst_tokens=bound
            )
            again = device.dispatch(x, handle=handle)[0]
            combined, combined_weights, _ = device.combine(again, handle, topk_weights=recv_weights)
            return recv, recv_idx, combined, combined_weights

        step()
        routed = routing_of(device, given[0])
        captures = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
        with captures, pytest.raises(ConfigError, match="must have num_worst_tokens or a handle"):
            device.dispatch(x, **routed)
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            made = step()
        for inputs in [*given, given[0]]:
            x.copy_(inputs["x"])
            idx.copy_(inputs["topk_idx"])
            weights.copy_(inputs["topk_weights"])
            graph.replay()
            recv, recv_idx, recv_weights, _, handle, _ = collective.dispatch(
                inputs["x"], **routing_of(collective, inputs)
            )
            combined, combined_weights, _ = collective.combine(recv, handle, topk_weights=recv_weights)
            same("recv", made[0][: len(recv)], recv)
            same("recv_idx", made[1][: len(recv)], recv_idx)
            same("combined", made[2], combined)
            same("combined weights", made[3], combined_weights)
        # Its memory may not be given to others while the graph lives.
        del graph, made


def check_wrong_arguments() -> None:
    """Each is named on every rank, and then the buffer goes on."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    case = Case(num_tokens=(20,), seed=40)
    given = make_inputs(case)
    with buffers() as pair:
        device = pair[0]
        routed = routing_of(device, given)
        x = given["x"]
        handle = device.dispatch(x, **routed)[4]
        others = make_inputs(replace(case, seed=41))
        other = device.dispatch(others["x"], **routing_of(device, others))[4]
        torch.cuda.synchronize()
        is_odd = rank == num_ranks - 1

        with pytest.raises(RankMismatchError) as caught:
            device.dispatch(x[:, :32].contiguous() if is_odd else x, **routed)
        assert caught.value.field == "hidden"
        assert "32 on rank" in str(caught.value)
        assert "64 on rank" in str(caught.value)
        with pytest.raises(RankMismatchError, match="same dtype of x"):
            device.dispatch(x.half() if is_odd else x, **routed)

        def twice(first: Callable[[], object], second: Callable[[], object]) -> None:
            """Where the host does not wait for the first call, it learns of it in a later one, and not on all ranks in
            the same: calls between count on no rank.
            """
            first()
            if rank % 2 == 0:
                torch.cuda.synchronize()
            second()
            torch.cuda.synchronize()
            second()

        def combine() -> None:
            device.combine(x.new_zeros(len(handle.recv_src_idx), 64), handle)

        def dispatch(**options: Any) -> None:
            device.dispatch(x, **{**routed, **options})

        with pytest.raises(RankMismatchError, match=r"same operation \(got"):
            twice(combine, combine) if is_odd else dispatch()
        wrong = routed["num_tokens_per_rank"] + int(is_odd)
        with pytest.raises(ConfigError, match=rf"num_tokens_per_rank must count .*on rank {num_ranks - 1}"):
            dispatch(num_tokens_per_rank=wrong)
        most = 1 if is_odd else 20 * num_ranks
        too_few = rf"num_worst_tokens must be at least .*rank {num_ranks - 1} receives"
        for then in (dispatch, combine):
            with pytest.raises(ConfigError, match=too_few):
                twice(lambda: dispatch(num_worst_tokens=most), then)
        mixed = other if is_odd else handle
        with pytest.raises(ConfigError, match="handle must be of the same dispatch on every rank"):
            twice(lambda: device.dispatch(x, handle=mixed), dispatch)
        with pytest.raises(ConfigError, match="send_head of the handle must be"):
            device.dispatch(x, handle=handle._replace(send_head=handle.send_head.long()))
        dist.barrier()
        compare(pair, CASES["few"])


def check_late_peer() -> None:
    """A rank that does not come is named by all others, in a dispatch and in a combine."""
    rank, late = dist.get_rank(), dist.get_world_size() - 1
    for call in ("dispatch", "combine"):
        device = Buffer(dist.group.WORLD, 1 << 20, backend="device", explicitly_destroy=True, num_cpu_timeout_secs=2)
        given = make_inputs(Case(num_tokens=(20,), seed=50))
        routed = routing_of(device, given)
        recv, _, _, _, handle, _ = device.dispatch(given["x"], **routed)
        torch.cuda.synchronize()
        dist.barrier()
        if rank != late:
            if call == "combine":
                # The host does not wait for it, so the next call raises.
                device.combine(recv, handle)
                torch.cuda.synchronize()
            with pytest.raises(CommTimeoutError) as caught:
                device.dispatch(given["x"], **routed)
            assert caught.value.peers == (late,)
            assert caught.value.phase == "the opening of a normal call"
            # It stays: what was under way is lost.
            with pytest.raises(CommTimeoutError):
                device.combine(recv, handle)
        torch.cuda.synchronize()
        dist.barrier()
        device.destroy()


def check_dropped_buffer() -> None:
    """Its window goes with it, without `destroy` and without a collection of garbage."""
    given = make_inputs(Case(num_tokens=(9, 4), seed=61))
    buffer = Buffer(dist.group.WORLD, 1 << 20, backend="device")
    recv, _, _, _, handle, _ = buffer.dispatch(given["x"], **routing_of(buffer, given))
    buffer.combine(recv, handle)
    torch.cuda.synchronize()
    dist.barrier()
    assert buffer._context is not None
    window = weakref.ref(buffer._context.memory)
    gc.disable()
    try:
        del buffer
        assert window() is None
    finally:
        gc.enable()
    assert recv.sum().isfinite(), "results outlive it"


def check_several_nodes() -> None:
    """There are no kernels between nodes: to ask for them is an error, and messages do."""
    use_gpu()
    with pytest.raises(TopologyError, match="Buffer's device backend needs all ranks in one LSA team"):
        Buffer(dist.group.WORLD, backend="device")
    buffer = Buffer(dist.group.WORLD, backend="collective")
    given = make_inputs(Case(num_tokens=(9, 4), seed=60))
    recv, _, _, _, handle, _ = buffer.dispatch(given["x"], **routing_of(buffer, given))
    assert len(handle) == 10
    same("rows", recv.device, given["x"].device)


def call_framework(call: Callable[[], None]) -> None:
    """The calls of a framework, on CUDA tensors and buffers of the device backend."""
    with on_device_backend():
        call()
