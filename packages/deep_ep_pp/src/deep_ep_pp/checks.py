"""Owns the checks of arguments: one for each, before anything is sent. What ranks must agree on is checked by them."""

from __future__ import annotations

from typing import TypeGuard

import torch

from deep_ep_core.backend_choice import check_backend
from deep_ep_core.errors import ConfigError
from deep_ep_core.refusals import rejected
from deep_ep_pp.sizing import BUFFER_ALIGNMENT_BYTES, PipelineConfig, link_bytes, message_bytes, peers_with_slots

__all__ = ["MAX_TENSORS", "check_config", "check_constructor", "check_message", "check_peer"]

MAX_TENSORS = 32
"""Most tensors of a message: their sizes travel in a header of fixed length."""

# A year. The group's backends count in milliseconds of few bits, and none knows infinity.
_MAX_TIMEOUT_S = 365 * 24 * 3600


def check_constructor(num_bytes: object, num_cpu_timeout_secs: object, backend: object) -> None:
    """Check what a buffer is made with.

    Raises:
        ConfigError: An argument cannot be taken.
    """
    if num_bytes is not None and (not _is_int(num_bytes) or num_bytes <= 0 or num_bytes % BUFFER_ALIGNMENT_BYTES):
        raise ConfigError(
            f"num_bytes must be a positive multiple of {BUFFER_ALIGNMENT_BYTES} (got {num_bytes!r}); "
            "PipelineBuffer.get_pp_buffer_size_hint(...) gives one, and None takes what pp_set_config needs"
        )
    if not isinstance(num_cpu_timeout_secs, (int, float)) or not 0 < num_cpu_timeout_secs <= _MAX_TIMEOUT_S:
        raise ConfigError(
            f"num_cpu_timeout_secs must be positive and at most {_MAX_TIMEOUT_S} (got {num_cpu_timeout_secs!r}); "
            "pass seconds"
        )
    check_backend(backend)


def check_config(
    rank: int,
    num_ranks: int,
    num_bytes: int | None,
    num_max_tensor_bytes: object,
    num_max_inflight_tensors: object,
) -> PipelineConfig:
    """Check the arguments of `pp_set_config`.

    Args:
        rank: This rank.
        num_ranks: Number of ranks in the group.
        num_bytes: Size of the buffer; None for as much as is needed.
        num_max_tensor_bytes: As passed.
        num_max_inflight_tensors: As passed.

    Returns:
        The configuration, with the peers that there is room for.

    Raises:
        ConfigError: An argument cannot be taken, or the buffer is too small.
    """
    if not _is_int(num_max_tensor_bytes) or num_max_tensor_bytes < 1:
        raise rejected(
            rank, "num_max_tensor_bytes must be an integer of at least 1", repr(num_max_tensor_bytes), "pass bytes"
        )
    if not _is_int(num_max_inflight_tensors) or num_max_inflight_tensors < 1:
        raise rejected(
            rank,
            "num_max_inflight_tensors must be an integer of at least 1",
            repr(num_max_inflight_tensors),
            "pass how many messages may be on their way",
        )
    num_others = num_ranks - 1
    num_links = num_others
    if num_bytes is not None:
        each_bytes = link_bytes(num_max_tensor_bytes, num_max_inflight_tensors)
        num_links = num_bytes // each_bytes
        if num_links < min(2, num_others):
            raise rejected(
                rank,
                f"pp_set_config needs a buffer of at least {min(2, num_others) * each_bytes} bytes for "
                f"{num_max_inflight_tensors} messages of {num_max_tensor_bytes} bytes",
                f"one of {num_bytes}",
                "make the buffer with the bytes of get_pp_buffer_size_hint(...), or with None",
            )
    return PipelineConfig(
        num_max_tensor_bytes=num_max_tensor_bytes,
        num_max_inflight_tensors=num_max_inflight_tensors,
        peers=peers_with_slots(rank, num_ranks, num_links),
    )


def check_peer(config: PipelineConfig, rank: int, num_ranks: int, name: str, peer: object) -> int:
    """Check the rank to send to or to receive from; returns it.

    Raises:
        ConfigError: It is none that this rank can exchange messages with.
    """
    if not _is_int(peer) or not 0 <= peer < num_ranks or peer == rank:
        raise rejected(
            rank,
            f"{name} must be the index of another rank of the group, from 0 to {num_ranks - 1}",
            repr(peer),
            "count ranks inside the buffer's group, not in the world",
        )
    if peer not in config.peers:
        raise rejected(
            rank,
            f"{name} must be a rank that the buffer has room for, of {list(config.peers)}",
            peer,
            "make the buffer with num_bytes=None, or with get_pp_buffer_size_hint(..., num_peers=number of ranks - 1)",
        )
    return peer


def check_message(config: PipelineConfig, rank: int, t: object) -> list[torch.Tensor]:
    """Check the tensors of a message; returns them as a list.

    Raises:
        ConfigError: They cannot be sent, or do not fit into a slot.
    """
    tensors = [t] if isinstance(t, torch.Tensor) else list(t) if isinstance(t, (list, tuple)) else []
    if not 1 <= len(tensors) <= MAX_TENSORS or not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise rejected(
            rank,
            f"t must be a tensor, or a list or tuple of 1 to {MAX_TENSORS} tensors",
            f"{len(t)} items" if isinstance(t, (list, tuple)) else type(t).__name__,
            "pass the tensors of the message",
        )
    for idx, tensor in enumerate(tensors):
        if not _has_plain_bytes(tensor):
            raise rejected(
                rank,
                "t must be contiguous, with its values in memory as they are",
                f"tensor {idx} of the message: {_shown(tensor)}",
                "call .contiguous() or .resolve_conj() first, and receive into such a tensor",
            )
        if tensor.device != tensors[0].device:
            raise rejected(
                rank,
                "the tensors of a message must be on one device",
                f"{tensors[0].device} and {tensor.device}",
                "move them, or send two messages",
            )
    needed_bytes = message_bytes(tensor.nbytes for tensor in tensors)
    if needed_bytes > config.slot_bytes:
        raise rejected(
            rank,
            f"a message must fit into the {config.slot_bytes} bytes of a slot, each tensor rounded up to 32 bytes",
            f"{needed_bytes} bytes for sizes {[tensor.nbytes for tensor in tensors]}",
            "raise num_max_tensor_bytes with pp_set_config on all ranks",
        )
    return tensors


def _has_plain_bytes(tensor: torch.Tensor) -> bool:
    return (
        tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _shown(tensor: torch.Tensor) -> str:
    """Shape, dtype, layout and device of a tensor, for a message."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    layout = ""
    if tensor.layout is not torch.strided:
        layout = f" {str(tensor.layout).removeprefix('torch.')}"
    elif not tensor.is_contiguous():
        layout = f" with strides {list(tensor.stride())}"
    elif tensor.is_conj() or tensor.is_neg():
        layout = " not yet conjugated or negated"
    return f"{list(tensor.shape)} {dtype}{layout} on {tensor.device}"


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
