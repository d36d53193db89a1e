"""Calls that must be refused before anything is sent; each rank makes them all and reports what it was told."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from deep_ep_core.errors import ConfigError
from deep_ep_ep import ElasticBuffer, autograd

NUM_EXPERTS = 8
HIDDEN = 256
MAX_TOKENS = 16


class Setup:
    """One buffer, valid arguments, and valid handles to spoil."""

    def __init__(self) -> None:
        self.buffer = ElasticBuffer(
            None, num_max_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_allocated_qps=9, num_cpu_timeout_secs=30
        )
        self.other = ElasticBuffer(None, num_max_tokens_per_rank=MAX_TOKENS, hidden=HIDDEN, num_cpu_timeout_secs=30)
        self.single_rounding = ElasticBuffer(
            None,
            num_max_tokens_per_rank=MAX_TOKENS,
            hidden=HIDDEN,
            allow_multiple_reduction=False,
            num_cpu_timeout_secs=30,
        )
        self.x = torch.ones(4, HIDDEN, dtype=torch.bfloat16)
        self.topk_idx = torch.tensor([[0, 4], [1, 5], [-1, -1], [7, 0]])
        self.weights = torch.ones(4, 2)
        self.stats = torch.zeros(NUM_EXPERTS // dist.get_world_size(), dtype=torch.int32)
        self.handle = self.dispatch()[3]
        self.exp_handle = self.dispatch(do_expand=True)[3]
        self.other_handle = self.dispatch(buffer=self.other)[3]
        self.single_handle = self.dispatch(buffer=self.single_rounding, do_expand=True)[3]

    def dispatch(self, x: object = None, buffer: ElasticBuffer | None = None, **changes: object) -> tuple:
        arguments: dict[str, object] = {"num_experts": NUM_EXPERTS}
        if "handle" in changes:
            arguments = {}
        else:
            arguments["topk_idx"] = self.topk_idx
        arguments.update(changes)
        return (buffer or self.buffer).dispatch(self.x if x is None else x, **arguments)

    def combine(self, x: object = None, handle: object = None, buffer: ElasticBuffer | None = None, **changes: object):
        handle = handle if handle is not None else self.handle
        if x is None:
            rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
            x = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
        return (buffer or self.buffer).combine(x, handle, **changes)


def spoiled_handle(s: Setup, metadata: object):
    handle = s.dispatch()[3]
    handle.recv_src_metadata = metadata
    return handle


def closed(s: Setup) -> None:
    buffer = ElasticBuffer(None, num_bytes=2 << 20, num_cpu_timeout_secs=30)
    buffer.close()
    buffer.close()
    s.dispatch(buffer=buffer)


def wide(rows: int, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.ones(rows, hidden, dtype=torch.bfloat16)


# Name: (call, words that its message must hold).
REJECTIONS: dict[str, tuple[Callable[[Setup], object], tuple[str, ...]]] = {
    # What upstream rejects.
    "negative num_sms": (lambda s: s.dispatch(num_sms=-1), ("num_sms must be", ">= 0", "-1")),
    "negative num_sms in combine": (lambda s: s.combine(num_sms=-2), ("num_sms must be", "-2")),
    "num_qps above the allocated": (lambda s: s.dispatch(num_qps=10), ("num_qps", "[0, 9]", "10", "num_allocated_qps")),
    "zero padding without expand": (lambda s: s.dispatch(do_zero_padding=True), ("do_zero_padding", "do_expand=True")),
    "cached with CPU sync": (lambda s: s.dispatch(handle=s.handle, do_cpu_sync=True), ("do_cpu_sync", "handle")),
    "cached with stats": (
        lambda s: s.dispatch(handle=s.handle, cumulative_local_expert_recv_stats=s.stats),
        ("cumulative_local_expert_recv_stats", "None with a handle"),
    ),
    "cached with topk_idx": (
        lambda s: s.dispatch(handle=s.handle, topk_idx=s.topk_idx),
        ("topk_idx must be None with a handle",),
    ),
    "cached metadata of a wrong shape": (
        lambda s: s.combine(handle=spoiled_handle(s, s.handle.recv_src_metadata[:, :3])),
        ("recv_src_metadata", "[num_recv_tokens, num_topk + 2]"),
    ),
    "cached metadata of a wrong dtype": (
        lambda s: s.combine(handle=spoiled_handle(s, s.handle.recv_src_metadata.long())),
        ("recv_src_metadata", "int32", "int64"),
    ),
    "cached metadata of a wrong layout": (
        lambda s: s.dispatch(handle=spoiled_handle(s, s.handle.recv_src_metadata.t().contiguous().t())),
        ("recv_src_metadata", "contiguous", "strides"),
    ),
    "cached with another num_experts": (
        lambda s: s.dispatch(handle=s.handle, num_experts=16),
        ("num_experts must equal the handle's 8", "16"),
    ),
    "cached with another alignment": (
        lambda s: s.dispatch(handle=s.handle, expert_alignment=4),
        ("expert_alignment must equal the handle's 1",),
    ),
    "cached with another M": (
        lambda s: s.dispatch(handle=s.handle, num_max_tokens_per_rank=8),
        ("num_max_tokens_per_rank must equal the handle's 16",),
    ),
    "cached with other rows": (lambda s: s.dispatch(wide(3), handle=s.handle), ("as many rows", "4", "3")),
    "x of one axis": (lambda s: s.dispatch(s.x[0]), ("[num_tokens, hidden]", "[256]")),
    "x of three axes": (lambda s: s.dispatch(s.x[None]), ("[num_tokens, hidden]", "[1, 4, 256]")),
    "x not contiguous": (lambda s: s.dispatch(wide(4, 512)[:, ::2]), ("contiguous", "strides")),
    "x not a tensor": (lambda s: s.dispatch([[1.0]]), ("contiguous [num_tokens, hidden] tensor", "list")),
    "x rows not of 16 bytes": (lambda s: s.dispatch(wide(4, 12)), ("multiple of 16 bytes", "24 bytes", "hidden 12")),
    "x of more rows than M": (
        lambda s: s.dispatch(wide(17), topk_idx=torch.zeros(17, 1, dtype=torch.int64)),
        ("at most num_max_tokens_per_rank = 16 rows", "17"),
    ),
    "sf of one axis": (lambda s: s.dispatch((s.x, torch.ones(4))), ("sf must be", "[num_tokens, num_packs]", "[4]")),
    "sf of 2-byte elements": (
        lambda s: s.dispatch((s.x, torch.ones(4, 2, dtype=torch.bfloat16))),
        ("4-byte elements", "bfloat16"),
    ),
    "sf with other rows": (lambda s: s.dispatch((s.x, torch.ones(3, 2))), ("sf must be", "[3, 2]")),
    "sf on another device": (lambda s: s.dispatch((s.x, torch.ones(4, 2, device="meta"))), ("on cpu", "on meta")),
    "a tuple of three": (lambda s: s.dispatch((s.x, s.x, s.x)), ("(x, sf)", "a tuple of 3")),
    "topk_idx of floats": (
        lambda s: s.dispatch(topk_idx=s.topk_idx.float()),
        ("topk_idx must be", "[4, 2]", "int64 or int32", "float32"),
    ),
    "topk_idx of int16": (lambda s: s.dispatch(topk_idx=s.topk_idx.short()), ("int64 or int32", "int16")),
    "topk_idx with other rows": (lambda s: s.dispatch(topk_idx=s.topk_idx[:3]), ("topk_idx must be", "[3, 2]")),
    "topk_idx not contiguous": (
        lambda s: s.dispatch(topk_idx=s.topk_idx.t().contiguous().t()),
        ("topk_idx", "contiguous", "strides"),
    ),
    "topk_idx of one axis": (lambda s: s.dispatch(topk_idx=s.topk_idx[:, 0]), ("topk_idx must be", "[4]")),
    "neither topk_idx nor handle": (lambda s: s.dispatch(topk_idx=None), ("topk_idx or a handle", "neither")),
    "too many entries a token": (
        lambda s: s.dispatch(topk_idx=torch.full((4, 33), -1)),
        ("num_topk must lie in [1, 32]", "33"),
    ),
    "weights with other rows": (
        lambda s: s.dispatch(topk_weights=s.weights[:3]),
        ("topk_weights must be", "[4, 2]", "[3, 2]"),
    ),
    "weights not contiguous": (
        lambda s: s.dispatch(topk_weights=s.weights.t().contiguous().t()),
        ("topk_weights", "contiguous"),
    ),
    "weights of bfloat16": (
        lambda s: s.dispatch(topk_weights=s.weights.bfloat16()),
        ("topk_weights", "float32", "bfloat16"),
    ),
    "stats of a wrong shape": (
        lambda s: s.dispatch(cumulative_local_expert_recv_stats=torch.zeros(3, dtype=torch.int32)),
        ("cumulative_local_expert_recv_stats must be", "[num_local_experts]", "[3]"),
    ),
    "stats of int64": (
        lambda s: s.dispatch(cumulative_local_expert_recv_stats=s.stats.long()),
        ("cumulative_local_expert_recv_stats", "int32", "int64"),
    ),
    "experts that do not divide": (lambda s: s.dispatch(num_experts=9), ("multiple of the 2 ranks", "9")),
    "no num_experts": (lambda s: s.dispatch(num_experts=None), ("num_experts must be", "None")),
    "no experts": (lambda s: s.dispatch(num_experts=0), ("num_experts must be", ">= 1", "0")),
    "alignment of zero": (lambda s: s.dispatch(expert_alignment=0), ("expert_alignment must be", ">= 1")),
    "M of zero": (lambda s: s.dispatch(num_max_tokens_per_rank=0), ("num_max_tokens_per_rank must be", ">= 1")),
    "dispatch larger than the buffer": (
        lambda s: s.dispatch(wide(4, 1 << 20)),
        ("needs a buffer of", "num_bytes=", "get_buffer_size_hint"),
    ),
    "combine larger than the buffer": (
        lambda s: s.combine(wide(s.handle.num_recv_tokens, 1 << 20)),
        ("this combine needs a buffer of", "get_buffer_size_hint"),
    ),
    "previous_event without allocate_on_comm_stream": (
        lambda s: s.dispatch(previous_event=s.buffer.capture()),
        ("previous_event requires allocate_on_comm_stream=True",),
    ),
    "previous_event in combine likewise": (
        lambda s: s.combine(previous_event=s.buffer.capture()),
        ("previous_event requires allocate_on_comm_stream=True",),
    ),
    "an event that is none": (
        lambda s: s.dispatch(previous_event=3, allocate_on_comm_stream=True),
        ("previous_event must be an EventHandle", "int"),
    ),
    "combine of int8": (
        lambda s: s.combine(torch.ones(s.handle.num_recv_tokens, HIDDEN, dtype=torch.int8)),
        ("combine needs x of one of bfloat16", "int8"),
    ),
    "combine of fp8": (
        lambda s: s.combine(torch.ones(s.handle.num_recv_tokens, HIDDEN).to(torch.float8_e4m3fn)),
        ("combine needs x", "float8_e4m3fn"),
    ),
    "bias as a list": (lambda s: s.combine(bias=[s.x, s.x]), ("bias must be None, a tensor, or a tuple", "list of 2")),
    "three biases": (lambda s: s.combine(bias=(s.x, s.x, s.x)), ("tuple of exactly two", "tuple of 3")),
    "bias of a wrong shape": (lambda s: s.combine(bias=s.x[:2]), ("bias must be", "[num_tokens, hidden]", "[2, 256]")),
    "bias of a wrong dtype": (lambda s: s.combine(bias=(s.x, s.x.float())), ("bias[1]", "bfloat16", "float32")),
    "combine weights of a wrong shape": (
        lambda s: s.combine(topk_weights=torch.ones(s.handle.num_recv_tokens)),
        ("topk_weights must be", "[num_recv_tokens, num_topk]"),
    ),
    "expert-major combine weights of a wrong shape": (
        lambda s: s.combine(handle=s.exp_handle, topk_weights=torch.ones(s.exp_handle.num_expanded_tokens, 2)),
        ("topk_weights must be", "[num_expanded_tokens]"),
    ),
    "expert-major weights with one rounding": (
        lambda s: s.combine(
            handle=s.single_handle,
            buffer=s.single_rounding,
            topk_weights=torch.ones(s.single_handle.num_expanded_tokens),
        ),
        ("topk_weights must be None", "allow_multiple_reduction=False"),
    ),
    "a closed buffer": (closed, ("buffer must be open", "closed")),
    "destroy without the flag": (lambda s: s.buffer.destroy(), ("explicitly_destroy=True",)),
    "group-limited gates": (
        lambda s: s.buffer.get_theoretical_num_sms(8, 2, num_scaleout_topk=2),
        ("num_scaleout_topk must be 0",),
    ),
    # What upstream leaves undefined.
    "an expert that does not exist": (
        lambda s: s.dispatch(topk_idx=torch.tensor([[0, 1], [8, 2], [0, 1], [0, 1]])),
        ("below num_experts = 8", "[8, 2] for token 1"),
    ),
    "an expert named twice": (
        lambda s: s.dispatch(topk_idx=torch.tensor([[0, 1], [3, 2], [5, 5], [0, 1]])),
        ("at most once", "[5, 5] for token 2"),
    ),
    "weights of another num_topk": (
        lambda s: s.dispatch(topk_weights=torch.ones(4, 3)),
        ("topk_weights must be [num_tokens, num_topk] = [4, 2]", "[4, 3]"),
    ),
    "x at an address that is not aligned": (
        lambda s: s.dispatch(torch.ones(4 * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(4, HIDDEN)),
        ("start at a multiple of 16 bytes", "offset 1"),
    ),
    "combine x at an address that is not aligned": (
        lambda s: s.combine(
            torch.ones(s.handle.num_recv_tokens * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(-1, HIDDEN)
        ),
        ("start at a multiple of 16 bytes",),
    ),
    "combine of other rows": (
        lambda s: s.combine(wide(s.handle.num_recv_tokens + 1)),
        ("rows of the token-major dispatch",),
    ),
    "expert-major combine of other rows": (
        lambda s: s.combine(wide(s.exp_handle.num_expanded_tokens + 1), handle=s.exp_handle),
        ("rows of the expert-major dispatch",),
    ),
    "cached expand with a token-major handle": (
        lambda s: s.dispatch(handle=s.handle, do_expand=True),
        ("made with do_expand=True", "a token-major handle"),
    ),
    "handle of another buffer": (
        lambda s: s.dispatch(handle=s.other_handle),
        ("handle must come from a dispatch of this buffer",),
    ),
    "combine handle of another buffer": (
        lambda s: s.combine(handle=s.other_handle),
        ("handle must come from a dispatch of this buffer",),
    ),
    "a handle that is none": (lambda s: s.buffer.combine(s.x, "handle"), ("handle must be an EPHandle", "str")),
    "too many scale packs": (
        lambda s: s.dispatch((s.x, torch.ones(4, 9))),
        ("[num_tokens, num_packs] = [4, 1 to 8]", "[4, 9]"),
    ),
    "no scale packs": (lambda s: s.dispatch((s.x, torch.ones(4, 0))), ("1 to 8", "[4, 0]")),
    "bias on another device": (lambda s: s.combine(bias=s.x.to("meta")), ("bias must be", "on cpu", "on meta")),
    "weights on another device": (
        lambda s: s.dispatch(topk_weights=s.weights.to("meta")),
        ("topk_weights", "on cpu", "on meta"),
    ),
    "ids past int32": (
        lambda s: s.dispatch(num_max_tokens_per_rank=2**30),
        ("num_ranks * num_max_tokens_per_rank * num_topk must be at most 2147483647",),
    ),
    "weights that could not come back": (
        lambda s: autograd.dispatch(
            s.single_rounding, s.x, s.topk_idx, s.weights, num_experts=NUM_EXPERTS, do_expand=True
        ),
        ("allow_multiple_reduction=True",),
    ),
}

CONSTRUCTOR_REJECTIONS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "no size at all": ({}, ("num_max_tokens_per_rank and hidden must be positive", "0 and 0")),
    "num_bytes not of 2 MiB": ({"num_bytes": 3 << 19}, ("num_bytes must be a positive multiple of 2097152", "1572864")),
    "negative num_bytes": ({"num_bytes": -(2 << 20)}, ("num_bytes must be a positive multiple",)),
    "host memory": ({"num_bytes": 4 << 20, "num_cpu_bytes": 2 << 20}, ("num_cpu_bytes must be 0", "Engram")),
    "negative QPs": ({"num_bytes": 2 << 20, "num_allocated_qps": -1}, ("must not be negative", "-1")),
    "no timeout": ({"num_bytes": 2 << 20, "num_cpu_timeout_secs": 0}, ("num_cpu_timeout_secs must be positive", "0")),
    "an unknown backend": ({"num_bytes": 2 << 20, "backend": "magic"}, ("backend must be", "'magic'")),
    "the device backend": (
        {"num_bytes": 2 << 20, "backend": "device"},
        ('backend="device" needs GPUs', "torch finds no CUDA device", "on rank", 'use backend="auto" or "collective"'),
    ),
    "an unknown memory": ({"num_bytes": 2 << 20, "recv_memory": "host"}, ("recv_memory must be", "'host'")),
}


def collect_rejections() -> dict[str, tuple[str, str]]:
    """Error type and message of every call that must be refused; then one valid round, to show that all is well."""
    s = Setup()
    told = {}
    for name, (call, _) in REJECTIONS.items():
        try:
            call(s)
        except ConfigError as error:
            told[name] = (type(error).__name__, str(error))
    for name, (arguments, _) in CONSTRUCTOR_REJECTIONS.items():
        try:
            ElasticBuffer(None, **arguments)
        except ConfigError as error:
            told[name] = (type(error).__name__, str(error))
    combined, _, _ = s.combine()
    assert combined.shape == (4, HIDDEN)
    assert combined[3].sum() > 0
    return told
