"""Owns what a low-latency call must look like: every argument is checked here, before anything is sent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField
from deep_ep_legacy.logfmt import CHANNEL_MULTIPLE
from deep_ep_legacy.low_latency_fp8 import CHANNELS_PER_PACK, CHANNELS_PER_SCALE

__all__ = [
    "Handle",
    "agreed_sizes",
    "check_combine",
    "check_device",
    "check_dispatch",
    "check_handle",
    "check_mask_status",
    "check_sizes",
    "check_streams",
]

Handle = tuple[torch.Tensor, torch.Tensor, int, int, int]
"""`(src_info, layout_range, num_max_dispatch_tokens_per_rank, hidden, num_experts)`, as DeepEP V1 has it."""

_INDEX_DTYPES = (torch.int32, torch.int64)
_HANDLE_LEN = 5


class _Want(NamedTuple):
    """What a tensor must be; -1 in the shape stands for any size."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    meaning: str


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    layout = "" if value.is_contiguous() else f" with strides {list(value.stride())}"
    return f"{list(value.shape)} {_short(value.dtype)}{layout} on {value.device}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_tensor(rank: int, name: str, value: Any, want: _Want, device: torch.device | None = None) -> None:
    fits = isinstance(value, torch.Tensor) and value.dim() == len(want.shape) and value.is_contiguous()
    if fits:
        fits = all(need in (-1, size) for need, size in zip(want.shape, value.shape, strict=True))
        fits = fits and value.dtype in want.dtypes and device in (None, value.device)
    if not fits:
        dtypes = " or ".join(_short(dtype) for dtype in want.dtypes)
        where = "" if device is None else f" on {device}"
        raise rejected(
            rank, f"{name} must be contiguous {want.meaning} {dtypes}{where}", _shown(value), "cast, copy or move it"
        )


def check_streams(rank: int, async_finish: bool, return_recv_hook: bool) -> None:
    """A call returns an event or a hook, not both."""
    if async_finish and return_recv_hook:
        raise rejected(
            rank,
            "async_finish and return_recv_hook must not both be True",
            "both",
            "a hook already says when results are ready; leave async_finish out",
        )


def check_sizes(rank: int, num_ranks: int, num_max_tokens: Any, hidden: Any, num_experts: Any) -> None:
    """Check the sizes that all low-latency calls share."""
    for name, value in (("num_max_dispatch_tokens_per_rank", num_max_tokens), ("hidden", hidden)):
        if not isinstance(value, int) or value < 1:
            raise rejected(rank, f"{name} must be an integer of at least 1", repr(value), "pass the largest needed")
    if hidden % CHANNELS_PER_SCALE:
        raise rejected(
            rank, f"hidden must be a multiple of {CHANNELS_PER_SCALE} in low-latency calls", hidden, "pad the rows"
        )
    if not isinstance(num_experts, int) or num_experts < 1 or num_experts % num_ranks:
        raise rejected(
            rank,
            f"num_experts must be a positive multiple of the group's {num_ranks} ranks",
            repr(num_experts),
            "every rank holds as many experts as the others",
        )


def _check_topk_idx(
    rank: int, topk_idx: Any, num_tokens: int, num_experts: int, device: torch.device, *, reads_values: bool
) -> None:
    want = _Want((num_tokens, -1), _INDEX_DTYPES, f"[num_tokens = {num_tokens}, num_topk]")
    _check_tensor(rank, "topk_idx", topk_idx, want, device)
    if topk_idx.size(1) < 1:
        raise rejected(rank, "topk_idx must have a column at least", _shown(topk_idx), "pass -1 for no selection")
    if reads_values and topk_idx.numel():
        low, high = (int(value) for value in torch.aminmax(topk_idx))
        if low < -1 or high >= num_experts:
            raise rejected(
                rank,
                f"topk_idx must hold experts in [0, {num_experts}), or -1 for none",
                f"values from {low} to {high}",
                "look at the router's output",
            )


def check_dispatch(
    rank: int,
    num_ranks: int,
    *,
    x: Any,
    topk_idx: Any,
    num_max_tokens: Any,
    num_experts: Any,
    recv_stats: Any,
    wait_stats: Any,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    reads_values: bool,
) -> None:
    """Check a dispatch. With `reads_values` also what `topk_idx` holds, which waits for its device."""
    _check_tensor(rank, "x", x, _Want((-1, -1), (torch.bfloat16,), "[num_tokens, hidden]"))
    check_sizes(rank, num_ranks, num_max_tokens, x.size(1), num_experts)
    if len(x) > num_max_tokens:
        raise rejected(
            rank,
            f"x must have at most num_max_dispatch_tokens_per_rank = {num_max_tokens} rows",
            len(x),
            "pass more, on every rank, or fewer rows",
        )
    _check_topk_idx(rank, topk_idx, len(x), num_experts, x.device, reads_values=reads_values)
    if use_ue8m0 and not (round_scale and use_fp8):
        raise rejected(
            rank,
            "use_ue8m0 must come with use_fp8 and round_scale",
            f"use_fp8={use_fp8}, round_scale={round_scale}",
            "UE8M0 holds powers of two only; pass round_scale=True",
        )
    if use_ue8m0 and x.size(1) % CHANNELS_PER_PACK:
        raise rejected(
            rank,
            f"hidden must be a multiple of {CHANNELS_PER_PACK} with use_ue8m0",
            x.size(1),
            "four scales make one int32; pass use_ue8m0=False",
        )
    num_local_experts = num_experts // num_ranks
    if recv_stats is not None:
        want = _Want((num_local_experts,), (torch.int32,), f"[num_local_experts = {num_local_experts}]")
        _check_tensor(rank, "cumulative_local_expert_recv_stats", recv_stats, want, x.device)
    _check_wait_stats(rank, num_ranks, "dispatch_wait_recv_cost_stats", wait_stats, x.device)


def _check_wait_stats(rank: int, num_ranks: int, name: str, wait_stats: Any, device: torch.device) -> None:
    if wait_stats is not None:
        want = _Want((num_ranks,), (torch.int64,), f"[num_ranks = {num_ranks}]")
        _check_tensor(rank, name, wait_stats, want, device)


def check_handle(rank: int, num_ranks: int, handle: Any) -> Handle:
    """Check what a dispatch returned as its handle; a list of the same, which some callers keep, is taken too."""
    is_sequence = isinstance(handle, (tuple, list))
    if not is_sequence or len(handle) != _HANDLE_LEN:
        got = type(handle).__name__
        if is_sequence:
            got = f"a {got} of {len(handle)}"
        raise rejected(
            rank, f"handle must be the tuple of {_HANDLE_LEN} of a low_latency_dispatch", got, "pass what it returned"
        )
    src_info, layout_range, num_max_tokens, hidden, num_experts = handle
    check_sizes(rank, num_ranks, num_max_tokens, hidden, num_experts)
    num_local_experts = num_experts // num_ranks
    shapes = {
        "src_info": (num_local_experts, num_ranks * num_max_tokens),
        "layout_range": (num_local_experts, num_ranks),
    }
    for name, value, dtype in (("src_info", src_info, torch.int32), ("layout_range", layout_range, torch.int64)):
        _check_tensor(rank, f"the handle's {name}", value, _Want(shapes[name], (dtype,), f"{list(shapes[name])}"))
    return src_info, layout_range, num_max_tokens, hidden, num_experts


def check_combine(
    rank: int,
    num_ranks: int,
    *,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    handle: Handle,
    use_logfmt: bool,
    zero_copy: bool,
    out: Any,
    wait_stats: Any,
    reads_values: bool,
) -> None:
    """Check a combine. With `reads_values` also what `topk_idx` holds, which waits for its device."""
    src_info, _, num_max_tokens, hidden, num_experts = handle
    shape = (*src_info.shape, hidden)
    _check_tensor(rank, "x", x, _Want(shape, (torch.bfloat16,), f"{list(shape)}"), src_info.device)
    num_tokens = len(topk_idx) if isinstance(topk_idx, torch.Tensor) and topk_idx.dim() == 2 else -1
    _check_topk_idx(rank, topk_idx, num_tokens, num_experts, x.device, reads_values=reads_values)
    if num_tokens > num_max_tokens:
        raise rejected(
            rank,
            f"topk_idx must have at most the {num_max_tokens} rows of the dispatch",
            num_tokens,
            "pass the topk_idx of the dispatch",
        )
    want = _Want(tuple(topk_idx.shape), (torch.float32,), f"{list(topk_idx.shape)}")
    _check_tensor(rank, "topk_weights", topk_weights, want, x.device)
    if use_logfmt and zero_copy:
        raise rejected(
            rank, "use_logfmt and zero_copy must not both be True", "both", "rows that are encoded are copied anyway"
        )
    if use_logfmt and hidden % CHANNEL_MULTIPLE:
        raise rejected(
            rank, f"hidden must be a multiple of {CHANNEL_MULTIPLE} with use_logfmt", hidden, "pass use_logfmt=False"
        )
    if out is not None:
        want = _Want((num_tokens, hidden), (torch.bfloat16,), f"[num_tokens = {num_tokens}, hidden = {hidden}]")
        _check_tensor(rank, "out", out, want, x.device)
    _check_wait_stats(rank, num_ranks, "combine_wait_recv_cost_stats", wait_stats, x.device)


def check_device(rank: int, name: str, tensor: torch.Tensor, device: torch.device | None) -> None:
    """Check that a tensor is on the only device that a backend takes; None for any."""
    if device is not None and tensor.device != device:
        raise rejected(
            rank,
            f"{name} must be on {device} in low-latency calls of the device backend",
            tensor.device,
            'move it, or make the buffer with backend="collective"',
        )


def check_mask_status(rank: int, num_ranks: int, mask_status: Any) -> None:
    """Check where the mask is written to."""
    want = _Want((num_ranks,), (torch.int32,), f"[num_ranks = {num_ranks}]")
    _check_tensor(rank, "mask_status", mask_status, want)


def agreed_sizes(num_max_tokens: int, hidden: int, num_experts: int, **flags: bool) -> list[AgreedField]:
    """What the ranks must pass alike."""
    sizes = {"num_max_dispatch_tokens_per_rank": num_max_tokens, "hidden": hidden, "num_experts": num_experts}
    fields = [AgreedField(name=name, value=value) for name, value in sizes.items()]
    return fields + [
        AgreedField(name=name, value=int(value), show=lambda value: str(bool(value))) for name, value in flags.items()
    ]
