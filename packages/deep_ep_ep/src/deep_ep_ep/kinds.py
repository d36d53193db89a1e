"""Owns which calls of a buffer are alike, so that a call like one that passed the checks needs no checks of its own.

The key of a call holds all that `checks` looks at, so a call that differs in any of it finds nothing and is checked.
What a check says of a call that is wrong is not known here.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch

from deep_ep_ep.checks import ROW_ALIGNMENT_BYTES, BufferFacts

__all__ = ["Kinds", "combine_key", "dispatch_key"]

# A program makes few kinds of calls. How many tokens a call has is not part of its kind.
_MAX_KINDS = 64
_PLAIN_TYPES = frozenset((int, bool, type(None)))
# What looking at something raises that is not the tensor or the handle that it should be.
_NOT_AS_EXPECTED = (AttributeError, TypeError, ValueError, RuntimeError)

_Key = tuple[Any, ...]
_Kind = TypeVar("_Kind")


class Kinds(Generic[_Kind]):
    """The kinds of one operation that passed the checks, by their keys; of too many the oldest is forgotten."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[_Key, _Kind] = {}

    def __len__(self) -> int:
        return len(self._known)

    def find(self, key: _Key | None) -> _Kind | None:
        """The kind of calls with this key; None if no such call passed the checks, or it has no key."""
        if key is None:
            return None
        try:
            return self._known.get(key)
        except TypeError:
            # Something in it cannot be hashed, so it is not an argument that can be taken.
            return None

    def add(self, key: _Key | None, kind: _Kind) -> None:
        """Remember the kind of a call that passed the checks."""
        if key is None:
            return
        while len(self._known) >= _MAX_KINDS:
            self._known.pop(next(iter(self._known)), None)
        self._known[key] = kind


def dispatch_key(
    facts: BufferFacts,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    recv_stats: Any,
    handle: Any,
    counts: tuple[Any, ...],
    flags: tuple[Any, ...],
) -> _Key | None:
    """The key of a dispatch; None where an argument is not what it should be.

    Args:
        facts: What the checks know of the buffer.
        x: As in `ElasticBuffer.dispatch`, like the next four.
        topk_idx: See there.
        topk_weights: See there.
        recv_stats: `cumulative_local_expert_recv_stats`.
        handle: See there.
        counts: The integers of the call, `num_max_tokens_per_rank` first.
        flags: Its booleans.
    """
    try:
        rows, sf = x if isinstance(x, tuple) else (x, None)
        num_tokens, hidden = rows.shape
        sf_look: Any = None
        if sf is not None:
            num_sf_rows, num_packs = sf.shape
            sf_look = num_sf_rows == num_tokens, num_packs, _look(sf)
        if handle is None:
            num_idx_rows, num_topk = topk_idx.shape
            max_tokens = facts.num_max_tokens_per_rank if counts[0] is None else counts[0]
            routing: Any = (num_idx_rows == num_tokens, num_topk, num_tokens <= max_tokens, _look(topk_idx))
        else:
            num_topk = handle.num_topk
            is_fitting = handle.num_tokens == num_tokens <= handle.num_max_tokens_per_rank
            # The handle's own is what is sent along.
            sent_idx = handle.topk_idx
            is_fitting = is_fitting and sent_idx.shape == (num_tokens, num_topk)
            routing = (topk_idx is None, is_fitting, _look(sent_idx), _look_at_handle(handle))
        return (
            hidden,
            rows.data_ptr() % ROW_ALIGNMENT_BYTES,
            _look(rows),
            sf_look,
            routing,
            None if topk_weights is None else (topk_weights.shape == (num_tokens, num_topk), _look(topk_weights)),
            None if recv_stats is None else (recv_stats.shape, _look(recv_stats)),
            _with_types(counts),
            _with_types(flags),
        )
    except _NOT_AS_EXPECTED:
        return None


def combine_key(x: Any, handle: Any, topk_weights: Any, bias: Any, counts: tuple[Any, ...]) -> _Key | None:
    """The key of a combine; None where an argument is not what it should be.

    Args:
        x: As in `ElasticBuffer.combine`, like the next three.
        handle: See there.
        topk_weights: See there.
        bias: See there.
        counts: The integers of the call.
    """
    try:
        num_rows, hidden = x.shape
        is_by_expert = handle.do_expand
        weights_look: Any = None
        if topk_weights is not None:
            shape = (num_rows,) if is_by_expert else (num_rows, handle.num_topk)
            weights_look = topk_weights.shape == shape, _look(topk_weights)
        biases_look: Any = None
        if bias is not None:
            shape = handle.num_tokens, hidden
            biases = bias if isinstance(bias, tuple) else (bias,)
            biases_look = isinstance(bias, tuple), tuple((each.shape == shape, _look(each)) for each in biases)
        return (
            hidden,
            x.data_ptr() % ROW_ALIGNMENT_BYTES,
            num_rows == (handle.num_expanded_tokens if is_by_expert else handle.num_recv_tokens),
            _look(x),
            _look_at_handle(handle),
            weights_look,
            biases_look,
            _with_types(counts),
        )
    except _NOT_AS_EXPECTED:
        return None


def _with_types(values: tuple[Any, ...]) -> Any:
    """The values, which are plain, and their types: 1, 1.0 and True are equal, but not all of them are counts."""
    types = tuple(map(type, values))
    if not _PLAIN_TYPES.issuperset(types):
        raise TypeError("an argument is not a plain number")
    return values, types


def _look(tensor: torch.Tensor) -> _Key:
    """What the checks look at in any tensor, but for its shape."""
    return type(tensor), tensor.dtype, tensor.device, tensor.is_contiguous()


def _look_at_handle(handle: Any) -> _Key:
    """What the checks look at in a handle, but for its number of rows."""
    metadata, num_topk = handle.made("recv_src_metadata"), handle.num_topk
    return (
        type(handle),
        handle.buffer_id,
        handle.num_experts,
        handle.num_max_tokens_per_rank,
        handle.expert_alignment,
        handle.num_sms,
        handle.do_expand,
        num_topk,
        handle.topk_idx_dtype,
        handle.device,
        None if metadata is None else (metadata.shape == (handle.num_recv_tokens, num_topk + 2), _look(metadata)),
    )
