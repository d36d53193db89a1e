"""Ranks that disagree, route to nowhere or do not come, on the device backend: what all are told, what works then."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from ep_device_setting import is_in_window, on_device
from ep_device_shapes import make_large_buffer
from ep_device_window import check_one
from ep_rows import Problem, make_problem

from deep_ep_core.errors import DeepEPError
from deep_ep_ep import ElasticBuffer

_HIDDEN = 64
_MAX_TOKENS = 40

Told = dict[str, object]


def _problem(seed: int = 0) -> Problem:
    num_ranks = dist.get_world_size()
    return make_problem(
        seed, [33] * num_ranks, num_experts=4 * num_ranks, num_topk=4, num_max_tokens=_MAX_TOKENS, hidden=_HIDDEN
    )


def _told(call: Callable[[], object]) -> Told | None:
    """What a call that must fail says; None if it did not fail."""
    try:
        call()
    except DeepEPError as error:
        attributes = {name: getattr(error, name, None) for name in ("field", "values", "phase", "peers")}
        return {"type": type(error).__name__, "text": str(error), **attributes}
    return None


def _fail_now_or_later(buffer: ElasticBuffer, call: Callable[[], object], *, do_cpu_sync: bool) -> Told | None:
    """A call that waits on the host fails by itself; after another one the next call does, whatever it is."""
    if do_cpu_sync:
        return _told(call)
    told = _told(call)
    assert told is None, f"without a CPU sync a call must return before ranks are compared (got {told})"
    torch.cuda.synchronize()
    return _told(lambda: buffer.barrier(use_comm_stream=False))


# Name: (what one rank passes otherwise, named field, what is shown of it).
DISAGREEMENTS: dict[str, tuple[dict[str, object], str, str]] = {
    "num_experts": ({"num_experts": 64}, "num_experts", "64"),
    "num_max_tokens_per_rank": ({"num_max_tokens_per_rank": 48}, "num_max_tokens_per_rank", "48"),
    "hidden": ({"hidden": 128}, "hidden size of x", "128"),
    "dtype": ({"dtype": torch.float16}, "dtype of x", "float16"),
    "expert_alignment": ({"expert_alignment": 4}, "expert_alignment", "4"),
    "num_topk": ({"num_topk": 2}, "num_topk", "2"),
    "do_expand": ({"do_expand": True}, "do_expand", "True"),
    "scale packs": ({"num_sf_packs": 2}, "number of scale packs", "2"),
    "weights": ({"no_weights": True}, "dtype of topk_weights", "none"),
    "CPU sync": ({"other_sync": True}, "operation", "dispatch"),
}


def _call(buffer: ElasticBuffer, problem: Problem, changes: dict[str, object], *, do_cpu_sync: bool) -> None:
    x, topk_idx, weights = problem.inputs(dist.get_rank())
    assert isinstance(x, torch.Tensor)
    changes = dict(changes)
    hidden, dtype = int(changes.pop("hidden", _HIDDEN)), changes.pop("dtype", x.dtype)  # type: ignore[call-overload]
    num_packs, num_topk = changes.pop("num_sf_packs", 0), changes.pop("num_topk", problem.num_topk)
    has_weights = not changes.pop("no_weights", False)
    if changes.pop("other_sync", False):
        do_cpu_sync = not do_cpu_sync
    rows = torch.ones(len(x), hidden, dtype=dtype, device=x.device)  # type: ignore[arg-type]
    sf = torch.ones(len(x), num_packs, device=x.device) if num_packs else None  # type: ignore[arg-type]
    arguments = {"num_experts": problem.num_experts, **changes}
    buffer.dispatch(
        rows if sf is None else (rows, sf),
        topk_idx=topk_idx[:, :num_topk].contiguous(),
        topk_weights=weights[:, :num_topk].contiguous() if has_weights else None,
        do_cpu_sync=do_cpu_sync,
        **arguments,  # type: ignore[arg-type]
    )


def disagree(recv_memory: str) -> dict[str, Told | None]:
    """Each disagreement once in each way of waiting; behind each of them the buffer works."""
    told: dict[str, Told | None] = {}
    with on_device(recv_memory, num_bytes=8 << 20):
        rank, odd_rank = dist.get_rank(), dist.get_world_size() - 1
        buffer = make_large_buffer(_MAX_TOKENS, _HIDDEN)
        problem = _problem()
        for do_cpu_sync in (True, False):
            for name, (changes, _, _) in DISAGREEMENTS.items():
                if name == "CPU sync" and not do_cpu_sync:
                    # The rank that differs would fail at once and the others later: it is the case above.
                    continue
                mine = changes if rank == odd_rank else {}
                if name == "CPU sync":
                    told[name] = _told_of_other_sync(buffer, problem, mine)
                else:
                    told[f"{name}, {do_cpu_sync}"] = _fail_now_or_later(
                        buffer,
                        lambda mine=mine, sync=do_cpu_sync: _call(buffer, problem, mine, do_cpu_sync=sync),
                        do_cpu_sync=do_cpu_sync,
                    )
                # Ranks agree on what comes next, as a program must.
                dist.barrier()
                check_one(buffer, problem)
        for name, told_of_combine in _disagree_in_combine(buffer, problem):
            told[name] = told_of_combine
            dist.barrier()
            check_one(buffer, problem)
        buffer.close()
    return told


def _told_of_other_sync(buffer: ElasticBuffer, problem: Problem, mine: dict[str, object]) -> Told | None:
    """All wait on the host but one, which is told at its next call. By token such a call would be right."""
    return _fail_now_or_later(
        buffer,
        lambda: _call(buffer, problem, {"do_expand": True, **mine}, do_cpu_sync=True),
        do_cpu_sync="other_sync" not in mine,
    )


def _disagree_in_combine(buffer: ElasticBuffer, problem: Problem) -> Iterator[tuple[str, Told | None]]:
    """Another handle, shorter rows, weights on some ranks only, another operation."""
    is_odd = dist.get_rank() == dist.get_world_size() - 1
    x, topk_idx, weights = problem.inputs(dist.get_rank())
    first, second = (
        buffer.dispatch(x, topk_idx=topk_idx, topk_weights=weights, num_experts=problem.num_experts)  # type: ignore[arg-type]
        for _ in range(2)
    )
    recv_x, recv_weights = first[0], first[2]
    assert isinstance(recv_x, torch.Tensor)
    calls: dict[str, Callable[[], object]] = {
        "combine: handle": lambda: buffer.combine(recv_x, (first if is_odd else second)[3]),
        "combine: hidden": lambda: buffer.combine(recv_x[:, :32].contiguous() if is_odd else recv_x, first[3]),
        "combine: weights": lambda: buffer.combine(recv_x, first[3], topk_weights=None if is_odd else recv_weights),
        "combine: operation": lambda: (
            buffer.dispatch(x, handle=first[3]) if is_odd else buffer.combine(recv_x, first[3])  # type: ignore[arg-type]
        ),
    }
    for name, call in calls.items():
        yield name, _fail_now_or_later(buffer, call, do_cpu_sync=False)


def route_to_nowhere(recv_memory: str) -> dict[str, Told | None]:
    """One rank names an expert that does not exist, or one twice; behind each of these calls the buffer works."""
    told: dict[str, Told | None] = {}
    with on_device(recv_memory, num_bytes=8 << 20):
        rank, odd_rank = dist.get_rank(), dist.get_world_size() - 1
        buffer = make_large_buffer(1100, _HIDDEN)
        # Small ones are counted by every block, large ones by all blocks together.
        for num_tokens, token in ((33, 7), (1030, 1029)):
            num_ranks = dist.get_world_size()
            problem = make_problem(
                1, [num_tokens] * num_ranks, num_experts=4 * num_ranks, num_topk=2, num_max_tokens=1100, hidden=_HIDDEN
            )
            for entry, name in ((4 * num_ranks, "unknown"), (2, "repeated")):
                x, topk_idx, _ = problem.inputs(rank)
                if rank == odd_rank:
                    topk_idx[token] = torch.tensor([2, entry])
                for do_cpu_sync in (True, False):
                    arguments = {"topk_idx": topk_idx, "num_experts": problem.num_experts, "do_cpu_sync": do_cpu_sync}
                    call = functools.partial(buffer.dispatch, x, num_sms=4, **arguments)  # type: ignore[arg-type]
                    told[f"{name}, {num_tokens}, {do_cpu_sync}"] = _fail_now_or_later(
                        buffer, call, do_cpu_sync=do_cpu_sync
                    )
                    dist.barrier()
                    check_one(buffer, problem)
        buffer.close()
    return told


def stay_away(recv_memory: str, late_rank: int, timeout_s: float = 2.0) -> dict[str, Told | None]:
    """`late_rank` never makes the calls that the others make. Returns what these are told, by the kind of call."""
    told: dict[str, Told | None] = {}
    with on_device(recv_memory, num_bytes=8 << 20, num_gpu_timeout_secs=timeout_s):
        rank, problem = dist.get_rank(), _problem()
        buffers = [make_large_buffer(_MAX_TOKENS, _HIDDEN) for _ in range(3)]
        handle = None
        for buffer in buffers:
            # What is loaded at its first use shall not make any rank late.
            x, topk_idx, _ = problem.inputs(rank)
            recv_x, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=problem.num_experts)  # type: ignore[arg-type]
            buffer.barrier(with_cpu_sync=True)
        dist.barrier()
        if rank != late_rank:
            arguments = {"topk_idx": topk_idx, "num_experts": problem.num_experts}
            # On a stream of its own, so that its wait runs out beside the others.
            with torch.cuda.stream(torch.cuda.Stream()):
                buffers[1].barrier(use_comm_stream=False)
            buffers[2].combine(recv_x, handle)  # type: ignore[arg-type]
            told["dispatch"] = _told(lambda: buffers[0].dispatch(x, **arguments))  # type: ignore[arg-type]
            torch.cuda.synchronize()
            told["barrier"] = _told(lambda: buffers[1].barrier())
            told["combine"] = _told(lambda: buffers[2].combine(recv_x, handle))  # type: ignore[arg-type]
            # Until the buffer is made anew, every call says so.
            told["dispatch again"] = _told(lambda: buffers[0].dispatch(x, **arguments))  # type: ignore[arg-type]
        assert torch.full((1000,), 2.0, device="cuda").sum().item() == 2000.0, "CUDA is usable"
        dist.barrier()
        for buffer in buffers:
            buffer.close()
        # And everything works once all ranks make their buffers anew.
        buffer = make_large_buffer(_MAX_TOKENS, _HIDDEN)
        check_one(buffer, problem)
        buffer.close()
    return told


def check_late_rank_is_waited_for(recv_memory: str, delay_s: float = 1.0) -> None:
    """A rank that comes within the timeout costs the others its delay and nothing else."""
    with on_device(recv_memory, num_bytes=8 << 20):
        buffer, problem = make_large_buffer(_MAX_TOKENS, _HIDDEN), _problem()
        if dist.get_rank() == dist.get_world_size() - 1:
            torch.cuda._sleep(int(delay_s * 1e9))
        check_one(buffer, problem)
        buffer.close()


def fail_with_hosts_ahead(recv_memory: str) -> list[Told | None]:
    """Some hosts enqueue another operation behind one that fails, others are told first; behind it the buffer works."""
    told = []
    with on_device(recv_memory, num_bytes=8 << 20):
        rank, problem = dist.get_rank(), _problem()
        buffer = make_large_buffer(_MAX_TOKENS, _HIDDEN)
        x, topk_idx, _ = problem.inputs(rank)
        recv_x, _, _, handle, _ = buffer.dispatch(x, topk_idx=topk_idx, num_experts=problem.num_experts)  # type: ignore[arg-type]
        wrong_idx = topk_idx.clone()
        if rank == dist.get_world_size() - 1:
            wrong_idx[:1] = problem.num_experts

        def fail(is_told_first: bool, again: Callable[[], object]) -> None:
            buffer.dispatch(x, topk_idx=wrong_idx, num_experts=problem.num_experts, do_cpu_sync=False)  # type: ignore[arg-type]
            if is_told_first:
                torch.cuda.synchronize()
            again()
            torch.cuda.synchronize()
            buffer.barrier()

        def combine_again() -> None:
            buffer.combine(recv_x, handle)  # type: ignore[arg-type]

        def dispatch_again() -> None:
            buffer.dispatch(x, topk_idx=topk_idx, num_experts=problem.num_experts, do_cpu_sync=False)  # type: ignore[arg-type]

        for parity in (0, 1):
            for again in (combine_again, dispatch_again):
                told.append(_told(functools.partial(fail, rank % 2 == parity, again)))
                dist.barrier()
                check_one(buffer, problem)
        buffer.close()
    return told


def fail_on_one_rank(recv_memory: str) -> list[Told | None]:
    """The last rank has no room in the window for what it is sent; behind that the buffer works."""
    told = []
    with on_device(recv_memory, num_bytes=8 << 20):
        rank, problem = dist.get_rank(), _problem()
        buffer = make_large_buffer(_MAX_TOKENS, _HIDDEN)
        x, topk_idx, _ = problem.inputs(rank)
        handle = buffer.dispatch(x, topk_idx=topk_idx, num_experts=problem.num_experts)[3]  # type: ignore[arg-type]
        kept = []
        if rank == dist.get_world_size() - 1:
            while is_in_window(buffer, more := buffer.empty_like_recv(handle)):
                kept.append(more)

        def dispatch(arguments: dict[str, object]) -> None:
            buffer.dispatch(x, **arguments)  # type: ignore[arg-type]
            # Who has room finds out behind it.
            torch.cuda.synchronize()
            buffer.barrier()

        for arguments in ({"topk_idx": topk_idx, "num_experts": problem.num_experts}, {"handle": handle}):
            told.append(_told(functools.partial(dispatch, arguments)))
            dist.barrier()
        kept.clear()
        check_one(buffer, problem)
        buffer.close()
    return told
