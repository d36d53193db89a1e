"""Owns which arguments of dispatch and combine every rank must pass alike; backends compare them."""

from __future__ import annotations

from deep_ep_core.transport import AgreedField
from deep_ep_ep.checks import CombineArgs, DispatchArgs
from deep_ep_ep.handle import EPHandle

__all__ = ["agreed_by_combine", "agreed_by_dispatch"]


def agreed_by_dispatch(args: DispatchArgs) -> list[AgreedField]:
    """The values of a dispatch that every rank must pass alike."""
    weights_dtype = None if args.topk_weights is None else args.topk_weights.dtype
    return [
        AgreedField(name="num_experts", value=args.num_experts),
        AgreedField(name="num_max_tokens_per_rank", value=args.num_max_tokens_per_rank),
        AgreedField(name="hidden size of x", value=args.x.size(1)),
        AgreedField.of_dtype("dtype of x", args.x.dtype),
        AgreedField(name="num_topk", value=args.num_topk),
        AgreedField(name="expert_alignment", value=args.expert_alignment),
        AgreedField(name="do_expand", value=int(args.do_expand), show=_show_bool),
        AgreedField(name="number of scale packs", value=0 if args.sf is None else args.sf.size(1)),
        AgreedField.of_dtype("dtype of topk_weights", weights_dtype),
        AgreedField(name="handle", value=_handle_idx(args.handle), show=_show_handle),
    ]


def agreed_by_combine(args: CombineArgs) -> list[AgreedField]:
    """The values of a combine that every rank must pass alike."""
    weights_dtype = None if args.topk_weights is None else args.topk_weights.dtype
    return [
        AgreedField(name="handle", value=_handle_idx(args.handle), show=_show_handle),
        AgreedField(name="hidden size of x", value=args.x.size(1)),
        AgreedField.of_dtype("dtype of x", args.x.dtype),
        AgreedField.of_dtype("dtype of topk_weights", weights_dtype),
    ]


def _handle_idx(handle: EPHandle | None) -> int:
    return 0 if handle is None else handle.dispatch_idx


def _show_handle(value: int) -> str:
    return "none" if value == 0 else f"that of dispatch number {value} of this buffer"


def _show_bool(value: int) -> str:
    return str(bool(value))
