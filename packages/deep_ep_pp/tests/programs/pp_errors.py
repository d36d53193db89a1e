"""Calls that must be refused, and words of the refusal that help."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from pp_messages import make_buffer

from deep_ep_core.errors import ConfigError
from deep_ep_pp import PipelineBuffer, get_pp_buffer_size_hint

MIB = 1 << 20


def other() -> int:
    return (dist.get_rank() + 1) % dist.get_world_size()


def ring_buffer() -> PipelineBuffer:
    """A buffer with room for the neighbours in the ring of 4 ranks."""
    buffer = PipelineBuffer(None, get_pp_buffer_size_hint(MIB, 2), 20)
    buffer.pp_set_config(MIB, 2)
    return buffer


def set_config(*arguments: object) -> Callable[[], object]:
    return lambda: PipelineBuffer(None, 8 * MIB, 20).pp_set_config(*arguments)


def send(make: Callable[[], object], dst: object = None) -> Callable[[], object]:
    return lambda: make_buffer(max_bytes=1000).pp_send(make(), other() if dst is None else dst)


def recv(make: Callable[[], object], src: object = None) -> Callable[[], object]:
    return lambda: make_buffer(max_bytes=1000).pp_recv(make(), other() if src is None else src)


def scalar() -> torch.Tensor:
    return torch.zeros(1)


def use_closed() -> None:
    buffer = make_buffer()
    buffer.close()
    buffer.pp_send(scalar(), other())


# All are made on all ranks at once, since the buffers of some are made by all.
REJECTIONS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "tensor bytes of zero": (set_config(0, 2), ("num_max_tensor_bytes must be an integer of at least 1", "got 0")),
    "tensor bytes of no integer": (set_config(1.5, 2), ("num_max_tensor_bytes", "got 1.5")),
    "tensor bytes of truth": (set_config(True, 2), ("num_max_tensor_bytes", "got True")),
    "window of zero": (set_config(64, 0), ("num_max_inflight_tensors must be an integer of at least 1", "got 0")),
    "window of text": (set_config(64, "2"), ("num_max_inflight_tensors", "got '2'")),
    "buffer too small": (
        set_config(MIB, 3),
        (f"needs a buffer of at least {12 * MIB} bytes for 3 messages of {MIB} bytes", f"one of {8 * MIB}", "hint"),
    ),
    "too many bits": (
        lambda: PipelineBuffer(None, None, 20).pp_set_config(1 << 63, 1),
        ("num_max_tensor_bytes must fit into 64 bits",),
    ),
    "send before configuration": (
        lambda: PipelineBuffer(None, None, 20).pp_send(scalar(), other()),
        ("pp_set_config must come before the first message", "call it on all ranks"),
    ),
    "receive before configuration": (
        lambda: PipelineBuffer(None, None, 20).pp_recv(scalar(), other()),
        ("pp_set_config must come before the first message",),
    ),
    "closed buffer": (use_closed, ("the buffer must be open", "make a new PipelineBuffer")),
    "send to itself": (
        lambda: make_buffer().pp_send(scalar(), dist.get_rank()),
        ("dst_rank_idx must be the index of another rank of the group, from 0 to 3",),
    ),
    "receive from itself": (
        lambda: make_buffer().pp_recv(scalar(), dist.get_rank()),
        ("src_rank_idx must be the index of another rank of the group, from 0 to 3",),
    ),
    "rank past the end": (send(scalar, 4), ("dst_rank_idx", "from 0 to 3", "got 4")),
    "negative rank": (recv(scalar, -1), ("src_rank_idx", "got -1")),
    "rank of no integer": (send(scalar, 1.0), ("dst_rank_idx", "got 1.0")),
    "rank of truth": (send(scalar, True), ("dst_rank_idx", "got True")),
    "rank without slots": (
        lambda: ring_buffer().pp_send(scalar(), (dist.get_rank() + 2) % 4),
        ("dst_rank_idx must be a rank that the buffer has room for", "num_peers=number of ranks - 1"),
    ),
    "source without slots": (
        lambda: ring_buffer().pp_recv(scalar(), (dist.get_rank() + 2) % 4),
        ("src_rank_idx must be a rank that the buffer has room for",),
    ),
    "no tensor": (send(lambda: 3), ("t must be a tensor, or a list or tuple of 1 to 32 tensors", "got int")),
    "no tensors": (send(list), ("1 to 32 tensors", "got 0 items")),
    "too many tensors": (recv(lambda: [scalar()] * 33), ("1 to 32 tensors", "got 33 items")),
    "one that is no tensor": (send(lambda: (scalar(), None)), ("1 to 32 tensors", "got 2 items")),
    "not contiguous": (
        send(lambda: (scalar(), torch.zeros(3, 2).T)),
        ("t must be contiguous", "tensor 1 of the message: [2, 3] float32 with strides [1, 2] on cpu"),
    ),
    "receive into what is not contiguous": (recv(lambda: torch.zeros(4)[::2]), ("t must be contiguous",)),
    "not yet conjugated": (
        send(lambda: torch.zeros(2, dtype=torch.complex64).conj()),
        ("t must be contiguous, with its values in memory", "not yet conjugated", ".resolve_conj()"),
    ),
    "sparse": (send(lambda: torch.eye(2).to_sparse()), ("t must be contiguous", "sparse_coo")),
    "without memory": (send(lambda: torch.zeros(2, device="meta")), ("t must be contiguous", "on meta")),
    "too large": (
        send(lambda: torch.zeros(1025, dtype=torch.uint8)),
        ("a message must fit into the 1024 bytes of a slot", "1056 bytes for sizes [1025]", "raise num_max_tensor"),
    ),
    "receive more than a slot": (
        recv(lambda: [torch.zeros(1000, dtype=torch.uint8), torch.zeros(1)]),
        ("a message must fit", "1056 bytes for sizes [1000, 4]"),
    ),
    "device backend": (
        lambda: PipelineBuffer(None, None, 20, backend="device"),
        ('backend="device" needs GPUs (got none: ', 'use backend="auto" or "collective"'),
    ),
}

# Refused before a rank looks for the others.
CONSTRUCTOR_REJECTIONS: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "bytes below zero": ({"num_bytes": -2 * MIB}, ("num_bytes must be a positive multiple of 2097152",)),
    "bytes of zero": ({"num_bytes": 0}, ("num_bytes must be a positive multiple", "got 0")),
    "odd bytes": ({"num_bytes": 3 * MIB}, ("num_bytes must be a positive multiple", "get_pp_buffer_size_hint")),
    "bytes of no integer": ({"num_bytes": 2.0 * MIB}, ("num_bytes must be a positive multiple",)),
    "no time": ({"num_cpu_timeout_secs": 0}, ("num_cpu_timeout_secs must be positive", "got 0")),
    "time without end": ({"num_cpu_timeout_secs": float("inf")}, ("num_cpu_timeout_secs must be positive", "inf")),
    "no time at all": ({"num_cpu_timeout_secs": None}, ("num_cpu_timeout_secs must be positive", "got None")),
    "unknown backend": ({"backend": "nvlink"}, ('backend must be "auto", "collective" or "device"', "nvlink")),
}


def collect_rejections() -> dict[str, str]:
    """What this rank is told, by name of the call."""
    told = {}
    for name, (call, _) in REJECTIONS.items():
        try:
            call()
        except ConfigError as error:
            told[name] = str(error)
        dist.barrier()
    for name, (arguments, _) in CONSTRUCTOR_REJECTIONS.items():
        try:
            PipelineBuffer(None, **arguments)
        except ConfigError as error:
            told[name] = str(error)
    return told
