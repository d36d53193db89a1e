"""Owns which arguments of dispatch and combine every rank must pass alike; backends compare them."""

from __future__ import annotations

import functools

import torch

from deep_ep_core.transport import AgreedField
from deep_ep_ep.checks import CombineArgs, DispatchArgs
from deep_ep_ep.handle import EPHandle

__all__ = ["HANDLE_NAME", "agreed_by_combine", "agreed_by_dispatch"]

HANDLE_NAME = "handle"
"""Name of the field that calls of one kind may differ in."""


def agreed_by_dispatch(args: DispatchArgs) -> list[AgreedField]:
    """The values of a dispatch that every rank must pass alike."""
    weights_dtype = None if args.topk_weights is None else args.topk_weights.dtype
    num_sf_packs = 0 if args.sf is None else args.sf.size(1)
    return [
        *_of_shape(args.num_experts, args.num_max_tokens_per_rank, args.num_topk, args.expert_alignment),
        *_of_rows(args.x.size(1), args.x.dtype, num_sf_packs, weights_dtype),
        _of_layout(args.do_expand),
        _of_handle(args.handle),
    ]


def agreed_by_combine(args: CombineArgs) -> list[AgreedField]:
    """The values of a combine that every rank must pass alike."""
    weights_dtype = None if args.topk_weights is None else args.topk_weights.dtype
    return [_of_handle(args.handle), *_of_rows(args.x.size(1), args.x.dtype, 0, weights_dtype)]


# A program makes few kinds of calls, many times each: the fields of a kind are made once.
@functools.lru_cache(maxsize=256)
def _of_shape(
    num_experts: int, num_max_tokens_per_rank: int, num_topk: int, expert_alignment: int
) -> tuple[AgreedField, ...]:
    return (
        AgreedField(name="num_experts", value=num_experts),
        AgreedField(name="num_max_tokens_per_rank", value=num_max_tokens_per_rank),
        AgreedField(name="num_topk", value=num_topk),
        AgreedField(name="expert_alignment", value=expert_alignment),
    )


@functools.lru_cache(maxsize=256)
def _of_rows(
    hidden: int, dtype: torch.dtype, num_sf_packs: int, weights_dtype: torch.dtype | None
) -> tuple[AgreedField, ...]:
    return (
        AgreedField(name="hidden size of x", value=hidden),
        AgreedField.of_dtype("dtype of x", dtype),
        AgreedField(name="number of scale packs", value=num_sf_packs),
        AgreedField.of_dtype("dtype of topk_weights", weights_dtype),
    )


@functools.lru_cache(maxsize=2)
def _of_layout(do_expand: bool) -> AgreedField:
    return AgreedField(name="do_expand", value=int(do_expand), show=_show_bool)


def _of_handle(handle: EPHandle | None) -> AgreedField:
    return AgreedField(name=HANDLE_NAME, value=0 if handle is None else handle.dispatch_idx, show=_show_handle)


def _show_handle(value: int) -> str:
    return "none" if value == 0 else f"that of dispatch number {value} of this buffer"


def _show_bool(value: int) -> str:
    return str(bool(value))
