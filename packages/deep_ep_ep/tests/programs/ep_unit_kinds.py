"""Bad calls on buffers that know no kinds of calls, and on buffers that know those of valid calls much like them."""

from __future__ import annotations

import re

import torch
from ep_errors import NUM_EXPERTS, REJECTIONS, Setup

from deep_ep_core.errors import ConfigError
from deep_ep_ep.kinds import Kinds


def told_of(s: Setup, name: str) -> str:
    try:
        REJECTIONS[name][0](s)
    except ConfigError as error:
        # Tensors that are made by the call itself lie anywhere.
        return re.sub("0x[0-9a-f]+", "an address", f"{type(error).__name__}: {error}")
    return "accepted"


def call_in_every_form(s: Setup) -> None:
    """Valid calls, each twice, that the bad ones differ from in one argument."""
    for _ in range(2):
        for changes in ({}, {"topk_weights": s.weights}, {"do_expand": True}, {"num_sms": 4, "num_qps": 1}):
            s.dispatch(**changes)
        s.dispatch(cumulative_local_expert_recv_stats=s.stats.clone())
        s.dispatch((s.x, torch.ones(4, 8)))
        s.dispatch(handle=s.handle)
        s.dispatch(handle=s.exp_handle, do_expand=True)
        for handle in (s.handle, s.exp_handle):
            s.combine(handle=handle)
            s.combine(handle=handle, bias=s.x)


def errors_cold_and_warm() -> dict[str, tuple[str, str]]:
    """What each bad call is told by buffers that know no kinds, and by buffers that know many."""
    s = Setup()
    told = {}
    for name in REJECTIONS:
        for buffer in (s.buffer, s.other, s.single_rounding):
            buffer._dispatch_kinds, buffer._combine_kinds = Kinds(), Kinds()
        cold = told_of(s, name)
        call_in_every_form(s)
        told[name] = (cold, told_of(s, name))
    return told


def numbers_of_known_kinds() -> tuple[int, int, int]:
    """Kinds of a buffer that knows none, after calls of one kind, and after calls of very many."""
    s = Setup()
    kinds = s.buffer._dispatch_kinds = Kinds()
    num_before = len(kinds)
    for num_tokens in (4, 3, 0, 1):
        s.dispatch(s.x[:num_tokens], topk_idx=s.topk_idx[:num_tokens])
    num_of_one = len(kinds)
    for alignment in range(1, 90):
        s.dispatch(expert_alignment=alignment)
    return num_before, num_of_one, len(kinds)


def check_changed_arguments_are_noticed() -> None:
    """A call that differs from known ones in one argument gets what it asks for."""
    s = Setup()
    call_in_every_form(s)
    num_local = NUM_EXPERTS // s.buffer.num_ranks
    assert s.dispatch()[3].expert_alignment == 1
    assert s.dispatch(expert_alignment=4)[3].expert_alignment == 4
    assert s.dispatch(num_sms=6)[3].num_sms == 6
    assert s.dispatch(num_max_tokens_per_rank=8, do_cpu_sync=False)[0].size(0) == 8 * s.buffer.num_ranks
    assert s.dispatch(do_cpu_sync=False)[3].num_recv_tokens_per_expert_list == []
    assert len(s.dispatch(do_cpu_sync=True)[3].num_recv_tokens_per_expert_list) == num_local
    assert s.dispatch(s.x.float())[0].dtype == torch.float32
    assert s.dispatch(topk_idx=s.topk_idx.int())[3].topk_idx.dtype == torch.int32
    assert s.dispatch(do_handle_copy=False)[3].topk_idx is s.topk_idx
    assert s.dispatch(do_handle_copy=True)[3].topk_idx is not s.topk_idx
    x = s.x.clone().requires_grad_()
    assert not s.dispatch(x)[0].requires_grad
    assert torch.is_grad_enabled()
