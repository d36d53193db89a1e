"""Low-latency calls that must be refused, ranks that disagree, and ranks that are late or die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import torch
import torch.distributed as dist
from legacy_low_latency_cases import Case, expert_outputs, make_batches, make_session

from deep_ep_legacy.low_latency_messages import LatePeers, PendingMessages
from deep_ep_legacy.low_latency_peers import Peers

HIDDEN = 512
T = 8
E = 8


class Setup:
    """A dispatch that went well, and the calls to spoil."""

    def __init__(self) -> None:
        self.session = make_session(timeout_s=20)
        self.x = torch.ones(4, HIDDEN, dtype=torch.bfloat16)
        self.topk_idx = torch.tensor([[0, 1], [2, 3], [4, 5], [6, -1]])
        self.weights = torch.ones(4, 2)
        self.recv_x, _, self.handle, _, _ = self.dispatch()

    def dispatch(self, x: object = None, topk_idx: object = None, t: object = T, e: object = E, **changes: object):
        x = self.x if x is None else x
        topk_idx = self.topk_idx if topk_idx is None else topk_idx
        return self.session.low_latency_dispatch(x, topk_idx, t, e, **{"use_fp8": False, **changes})

    def combine(self, **changes: object):
        arguments = {"x": self.recv_x, "topk_idx": self.topk_idx, "topk_weights": self.weights, "handle": self.handle}
        return self.session.low_latency_combine(**{**arguments, **changes})


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def int64(value: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, value)


# Name: (call, words that its message must hold).
REJECTIONS: dict[str, tuple[Callable[[Setup], object], tuple[str, ...]]] = {
    "x of float32": (lambda s: s.dispatch(s.x.float()), ("x must be", "bfloat16", "float32")),
    "x of one axis": (lambda s: s.dispatch(s.x[0]), ("x must be", "[num_tokens, hidden]", "[512]")),
    "x with strides": (lambda s: s.dispatch(bf16(4, 1024)[:, ::2]), ("x must be contiguous", "strides [1024, 2]")),
    "no tensor": (lambda s: s.dispatch([1.0]), ("x must be", "list")),
    "odd hidden": (lambda s: s.dispatch(bf16(4, 192)), ("hidden must be a multiple of 128", "192")),
    "too many tokens": (
        lambda s: s.dispatch(bf16(9, HIDDEN), int64(0, 9, 1)),
        ("at most num_max_dispatch_tokens_per_rank = 8 rows", "got 9"),
    ),
    "no maximum": (lambda s: s.dispatch(t=0), ("num_max_dispatch_tokens_per_rank must be an integer", "got 0")),
    "uneven experts": (lambda s: s.dispatch(e=7), ("num_experts must be a positive multiple", "2 ranks", "7")),
    "topk_idx of another length": (lambda s: s.dispatch(topk_idx=int64(0, 3, 2)), ("topk_idx must be", "[3, 2]")),
    "topk_idx of floats": (lambda s: s.dispatch(topk_idx=torch.ones(4, 2)), ("int32 or int64", "float32")),
    "topk_idx without columns": (lambda s: s.dispatch(topk_idx=int64(0, 4, 0)), ("have a column", "[4, 0]")),
    "expert out of range": (lambda s: s.dispatch(topk_idx=int64(8, 4, 2)), ("experts in [0, 8)", "from 8 to 8")),
    "UE8M0 without rounding": (
        lambda s: s.dispatch(use_fp8=True, use_ue8m0=True),
        ("use_ue8m0 must come with", "round_scale=False"),
    ),
    "UE8M0 of a narrow row": (
        lambda s: s.dispatch(bf16(4, 640), use_fp8=True, round_scale=True, use_ue8m0=True),
        ("hidden must be a multiple of 512 with use_ue8m0", "640"),
    ),
    "event and hook": (
        lambda s: s.dispatch(async_finish=True, return_recv_hook=True),
        ("async_finish and return_recv_hook must not both",),
    ),
    "event and hook in combine": (
        lambda s: s.combine(async_finish=True, return_recv_hook=True),
        ("async_finish and return_recv_hook must not both",),
    ),
    "short stats": (
        lambda s: s.dispatch(cumulative_local_expert_recv_stats=torch.zeros(3, dtype=torch.int32)),
        ("cumulative_local_expert_recv_stats must be", "num_local_experts = 4", "[3]"),
    ),
    "wait stats of int32": (
        lambda s: s.dispatch(dispatch_wait_recv_cost_stats=torch.zeros(2, dtype=torch.int32)),
        ("dispatch_wait_recv_cost_stats must be", "int64", "int32"),
    ),
    "wait stats of int32 in combine": (
        lambda s: s.combine(combine_wait_recv_cost_stats=torch.zeros(2, dtype=torch.int32)),
        ("combine_wait_recv_cost_stats must be", "int64", "int32"),
    ),
    "a handle of three": (lambda s: s.combine(handle=s.handle[:3]), ("handle must be the tuple of 5", "a tuple of 3")),
    "no handle": (lambda s: s.combine(handle=None), ("handle must be the tuple of 5", "NoneType")),
    "a handle of other ranks": (
        lambda s: s.combine(handle=(s.handle[0][:, :8].contiguous(), *s.handle[1:])),
        ("the handle's src_info", "[4, 16]", "[4, 8]"),
    ),
    "x of another shape": (lambda s: s.combine(x=bf16(4, 8, HIDDEN)), ("x must be", "[4, 16, 512]", "[4, 8, 512]")),
    "FP8 x in combine": (lambda s: s.combine(x=s.recv_x.to(torch.float8_e4m3fn)), ("x must be", "bfloat16")),
    "weights of bfloat16": (lambda s: s.combine(topk_weights=bf16(4, 2)), ("topk_weights must be", "float32")),
    "weights of another shape": (lambda s: s.combine(topk_weights=torch.ones(4, 1)), ("topk_weights", "[4, 1]")),
    "topk_idx of one axis": (lambda s: s.combine(topk_idx=s.topk_idx[:, 0]), ("topk_idx must be",)),
    "more tokens than dispatched": (
        lambda s: s.combine(topk_idx=int64(0, 9, 2), topk_weights=torch.ones(9, 2)),
        ("at most the 8 rows of the dispatch", "9"),
    ),
    "out of another shape": (lambda s: s.combine(out=bf16(3, HIDDEN)), ("out must be", "num_tokens = 4", "[3, 512]")),
    "LogFMT without a copy": (
        lambda s: s.combine(use_logfmt=True, zero_copy=True),
        ("use_logfmt and zero_copy must not both",),
    ),
    "no copy, no buffer": (
        lambda s: s.combine(zero_copy=True),
        ("zero_copy must come after get_next_low_latency_combine_buffer", "no such buffer"),
    ),
    "the buffer of no handle": (
        lambda s: s.session.get_next_low_latency_combine_buffer((1, 2)),
        ("handle must be the tuple of 5", "a tuple of 2"),
    ),
    "clean without experts": (
        lambda s: s.session.clean_low_latency_buffer(T, HIDDEN, 3),
        ("num_experts must be a positive multiple", "3"),
    ),
    "mask without shrink": (
        lambda s: s.session.low_latency_update_mask_buffer(1, True),
        ("only with enable_shrink=True",),
    ),
    "query without shrink": (
        lambda s: s.session.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int32)),
        ("only with enable_shrink=True",),
    ),
    "clean mask without shrink": (
        lambda s: s.session.low_latency_clean_mask_buffer(),
        ("only with enable_shrink=True",),
    ),
}


def masking(call: Callable[[object], object]) -> Callable[[Setup], object]:
    return lambda s: call(make_session(enable_shrink=True))


REJECTIONS |= {
    "mask oneself": (
        masking(lambda session: session.low_latency_update_mask_buffer(dist.get_rank(), True)),
        ("rank_to_mask must be another rank in [0, 2)",),
    ),
    "mask a stranger": (
        masking(lambda session: session.low_latency_update_mask_buffer(2, True)),
        ("rank_to_mask must be another rank in [0, 2)", "got 2"),
    ),
    "query into int64": (
        masking(lambda session: session.low_latency_query_mask_buffer(torch.zeros(2, dtype=torch.int64))),
        ("mask_status must be", "int32", "int64"),
    ),
}


def narrow_logfmt(s: Setup) -> object:
    recv_x, _, handle, _, _ = s.dispatch(bf16(4, 640))
    return s.combine(x=recv_x, handle=handle, use_logfmt=True)


def other_topk_idx(s: Setup) -> object:
    return s.combine(topk_idx=torch.full_like(s.topk_idx, -1))


REJECTIONS |= {
    "LogFMT of a narrow row": (narrow_logfmt, ("hidden must be a multiple of 512 with use_logfmt", "640")),
    "another topk_idx": (other_topk_idx, ("topk_idx must be that of the dispatch", "got 0")),
}


def collect_rejections() -> dict[str, tuple[str, str]]:
    """What this rank was told, by name of the bad call; all ranks make all of them."""
    setup, told = Setup(), {}
    for name, (call, _) in REJECTIONS.items():
        try:
            call(setup)
        except Exception as error:
            told[name] = (type(error).__name__, str(error))
    # Refused calls leave the session usable.
    setup.dispatch()
    return told


def disagree(odd_rank: int, changes: dict[str, object], enable_shrink: bool) -> None:
    session, case = make_session(timeout_s=20, enable_shrink=enable_shrink), Case(num_tokens=(4, 4), num_max_tokens=T)
    batch = make_batches(case)[dist.get_rank()]
    mine = dict(changes) if dist.get_rank() == odd_rank else {}
    if mine.pop("clean", False):
        session.clean_low_latency_buffer(T, case.hidden, E)
    x = batch.x[:, : mine.pop("hidden", case.hidden)].contiguous()
    arguments = {"num_max_dispatch_tokens_per_rank": T, "num_experts": E, "round_scale": True, **mine}
    session.low_latency_dispatch(x, batch.topk_idx, **arguments)


def disagree_in_combine() -> None:
    session, case = make_session(timeout_s=20), Case(num_tokens=(4, 4), num_max_tokens=T)
    batch = make_batches(case)[dist.get_rank()]
    recv_x, recv_count, handle, _, _ = session.low_latency_dispatch(batch.x, batch.topk_idx, T, E, use_fp8=False)
    session.low_latency_combine(
        expert_outputs(case, recv_x, recv_count),
        batch.topk_idx,
        batch.topk_weights,
        handle,
        use_logfmt=dist.get_rank() == 1,
    )


def stay_away() -> None:
    """Rank 1 does not come."""
    session = make_session(timeout_s=1)
    if dist.get_rank() == 1:
        return
    session.low_latency_dispatch(torch.ones(1, HIDDEN, dtype=torch.bfloat16), int64(0, 1, 1), T, E)


def refuse() -> None:
    """Rank 1 passes what cannot be taken; the others are told why it does not come."""
    session = make_session(timeout_s=1)
    expert = 99 if dist.get_rank() == 1 else 0
    session.low_latency_dispatch(torch.ones(1, HIDDEN, dtype=torch.bfloat16), int64(expert, 1, 1), T, E)


def die_before_rows() -> str:
    """Rank 1 is killed after the ranks agreed and before its rows are under way; the others' hooks tell."""
    session = make_session(timeout_s=20)
    if dist.get_rank() == 1:
        original = Peers.open

        def open_and_die(*arguments):
            original(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        Peers.open = open_and_die
    message = ""
    try:
        *_, hook = session.low_latency_dispatch(
            torch.ones(1, HIDDEN, dtype=torch.bfloat16), int64(4, 1, 1), T, E, return_recv_hook=True
        )
        hook()
    except TimeoutError as error:
        message = str(error)
    try:
        session.clean_low_latency_buffer(T, HIDDEN, E)
    except Exception as error:
        return f"{message} | {type(error).__name__}: {error}"
    return message


def fail_alone() -> None:
    """Only rank 1 loses rows; rank 0 goes on to the next call, and is told why rank 1 does not come."""
    session = make_session(timeout_s=1)
    *_, hook = session.low_latency_dispatch(
        torch.ones(1, HIDDEN, dtype=torch.bfloat16), int64(4, 1, 1), T, E, return_recv_hook=True
    )
    if dist.get_rank() == 1:

        def lose(self, timeout_s):
            raise LatePeers([0], RuntimeError("the cable was pulled"))

        PendingMessages.wait = lose
    hook()
    session.clean_low_latency_buffer(T, HIDDEN, E)
