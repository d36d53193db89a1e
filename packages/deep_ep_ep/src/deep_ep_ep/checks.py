"""Owns what a call must look like: every argument of dispatch and combine is checked here, before anything is sent.

A call that passes is valid on this rank; whether the ranks agree is checked by the exchange that opens the operation.
Nothing here reads a tensor's values except `check_topk_values`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deep_ep_core.align import ceil_div
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import EventHandle, EventOverlap, StreamOptions
from deep_ep_ep.handle import EPHandle
from deep_ep_ep.reduction import COMBINE_DTYPES
from deep_ep_ep.sizing import MAX_NUM_TOPK

__all__ = [
    "BufferFacts",
    "CallKind",
    "CombineArgs",
    "DispatchArgs",
    "check_combine",
    "check_dispatch",
    "check_streams",
    "check_topk_values",
]

TOPK_IDX_DTYPES = (torch.int64, torch.int32)
# float64 serves gradient checks; kernels take float32.
WEIGHT_DTYPES = (torch.float32, torch.float64)
# Rows move in units of 16 bytes.
ROW_ALIGNMENT_BYTES = 16
SF_PACK_BYTES = 4
# A token has at most one scale pack per this many channels; buffers are sized for it.
MIN_CHANNELS_PER_SF_PACK = 32
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferFacts:
    """What the checks need to know of the buffer.

    Attributes:
        rank: This rank.
        num_ranks: Number of ranks.
        buffer_id: Identity of the buffer, for its handles.
        num_max_tokens_per_rank: The default M; 0 if the buffer was made without one.
        num_allocated_qps: Upper bound of `num_qps`.
        device_num_sms: SMs of the device, None without a GPU.
        allow_multiple_reduction: The buffer may round partial sums.
    """

    rank: int
    num_ranks: int
    buffer_id: int
    num_max_tokens_per_rank: int
    num_allocated_qps: int
    device_num_sms: int | None
    allow_multiple_reduction: bool


@dataclass(slots=True, kw_only=True, eq=False)
class CallKind:
    """What calls have in common that differ only in the values and addresses of tensors and in numbers of tokens.

    Attributes:
        settings: The arguments that are neither tensors nor handles, defaults resolved: the last fields of
            `DispatchArgs` or `CombineArgs`, in their order. Passed by position, which takes the host the least time.
        prepared: What the backend has ready for such calls; None until the first one.
    """

    settings: tuple[Any, ...]
    prepared: Any = None


@dataclass(slots=True, eq=False)
class DispatchArgs:
    """The arguments of a dispatch after the checks, defaults resolved. Made at every call, so not frozen."""

    x: torch.Tensor
    sf: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None
    recv_stats: torch.Tensor | None
    handle: EPHandle | None
    kind: CallKind
    num_experts: int
    num_max_tokens_per_rank: int
    expert_alignment: int
    num_sms: int
    num_qps: int
    do_handle_copy: bool
    do_cpu_sync: bool
    do_expand: bool
    do_zero_padding: bool
    use_tma_aligned_col_major_sf: bool

    @property
    def num_topk(self) -> int:
        """K: entries of a token's routing."""
        return self.topk_idx.size(1)


@dataclass(slots=True, eq=False)
class CombineArgs:
    """The arguments of a combine after the checks. Made at every call, so not frozen."""

    x: torch.Tensor
    handle: EPHandle
    topk_weights: torch.Tensor | None
    biases: tuple[torch.Tensor, ...]
    kind: CallKind
    num_sms: int
    num_qps: int


def _shown(tensor: torch.Tensor) -> str:
    """Shape, dtype, layout and device of a tensor, for a message."""
    layout = "" if tensor.is_contiguous() else f" with strides {list(tensor.stride())}"
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}{layout} on {tensor.device}"


def _check_tensor(
    facts: BufferFacts,
    name: str,
    tensor: Any,
    *,
    shape: tuple[int, ...],
    shape_text: str,
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """One rule for every side tensor: exact shape, dtype and device, contiguous."""
    is_tensor = isinstance(tensor, torch.Tensor)
    if (
        is_tensor
        and tensor.shape == shape
        and tensor.dtype in dtypes
        and tensor.device == device
        and tensor.is_contiguous()
    ):
        return
    dtype_text = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    must = f"{name} must be {shape_text} = {list(shape)} {dtype_text}, contiguous, on {device}"
    if not is_tensor:
        raise rejected(facts.rank, must, type(tensor).__name__, "pass a tensor")
    raise rejected(facts.rank, must, _shown(tensor), "reshape, cast, move or call .contiguous()")


def _check_count(facts: BufferFacts, name: str, value: Any, *, low: int, high: int | None, remedy: str) -> int:
    if not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        raise rejected(facts.rank, f"{name} must be {bound}", repr(value), remedy)
    return int(value)


def check_streams(
    facts: BufferFacts,
    *,
    previous_event: EventHandle | EventOverlap | None,
    previous_event_before_epilogue: EventHandle | EventOverlap | None,
    async_with_compute_stream: bool,
    allocate_on_comm_stream: bool,
) -> StreamOptions:
    """Check the stream arguments that dispatch and combine share."""
    if previous_event is None and previous_event_before_epilogue is None:
        return _options_without_events(bool(async_with_compute_stream), bool(allocate_on_comm_stream))
    for name, event in (
        ("previous_event", previous_event),
        ("previous_event_before_epilogue", previous_event_before_epilogue),
    ):
        if event is not None and not isinstance(event, EventHandle | EventOverlap):
            raise rejected(
                facts.rank, f"{name} must be an EventHandle or None", type(event).__name__, "pass buffer.capture()"
            )
    if previous_event is not None and not allocate_on_comm_stream:
        raise rejected(
            facts.rank,
            "previous_event requires allocate_on_comm_stream=True",
            "allocate_on_comm_stream=False",
            "set it, or drop previous_event",
        )
    return StreamOptions(
        previous_event=previous_event,
        previous_event_before_epilogue=previous_event_before_epilogue,
        async_with_compute_stream=bool(async_with_compute_stream),
        allocate_on_comm_stream=bool(allocate_on_comm_stream),
    )


@functools.cache
def _options_without_events(async_with_compute_stream: bool, allocate_on_comm_stream: bool) -> StreamOptions:
    return StreamOptions(
        async_with_compute_stream=async_with_compute_stream, allocate_on_comm_stream=allocate_on_comm_stream
    )


def _check_rows(facts: BufferFacts, x: Any, name: str = "x") -> None:
    """The rows to move: `[num_tokens, hidden]`, contiguous, rows of whole 16-byte units at an aligned address."""
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or not x.is_contiguous():
        got = _shown(x) if isinstance(x, torch.Tensor) else type(x).__name__
        raise rejected(
            facts.rank, f"{name} must be a contiguous [num_tokens, hidden] tensor", got, "reshape or copy it"
        )
    row_bytes = x.size(1) * x.element_size()
    if row_bytes == 0 or row_bytes % ROW_ALIGNMENT_BYTES:
        raise rejected(
            facts.rank,
            f"a row of {name} must be a positive multiple of {ROW_ALIGNMENT_BYTES} bytes",
            f"{row_bytes} bytes: hidden {x.size(1)} of {str(x.dtype).removeprefix('torch.')}",
            "pad the hidden size",
        )
    if x.numel() and x.data_ptr() % ROW_ALIGNMENT_BYTES:
        raise rejected(
            facts.rank,
            f"{name} must start at a multiple of {ROW_ALIGNMENT_BYTES} bytes",
            f"address {x.data_ptr():#x}, offset {x.storage_offset()} into its storage",
            "clone the view",
        )


def _check_handle(facts: BufferFacts, handle: Any) -> EPHandle:
    if not isinstance(handle, EPHandle):
        raise rejected(facts.rank, "handle must be an EPHandle", type(handle).__name__, "pass what dispatch returned")
    if handle.buffer_id != facts.buffer_id:
        raise rejected(
            facts.rank,
            "handle must come from a dispatch of this buffer",
            "a handle of another buffer",
            "use the buffer that made it, or dispatch again",
        )
    if handle.made("recv_src_metadata") is None:
        return handle
    metadata, shape = handle.recv_src_metadata, [handle.num_recv_tokens, handle.num_topk + 2]
    is_right = (
        isinstance(metadata, torch.Tensor)
        and list(metadata.shape) == shape
        and metadata.dtype == torch.int32
        and metadata.is_contiguous()
        and metadata.device == handle.device
    )
    if not is_right:
        got = _shown(metadata) if isinstance(metadata, torch.Tensor) else type(metadata).__name__
        raise rejected(
            facts.rank,
            f"handle.recv_src_metadata must be [num_recv_tokens, num_topk + 2] = {shape} int32, contiguous",
            got,
            "leave it as dispatch made it, or permute its rows",
        )
    return handle


def check_dispatch(
    facts: BufferFacts,
    *,
    x: Any,
    topk_idx: Any,
    topk_weights: Any,
    cumulative_local_expert_recv_stats: Any,
    num_experts: int | None,
    num_max_tokens_per_rank: int | None,
    expert_alignment: int | None,
    num_sms: int,
    num_qps: int,
    handle: Any,
    do_handle_copy: bool,
    do_cpu_sync: bool | None,
    do_expand: bool,
    do_zero_padding: bool,
    use_tma_aligned_col_major_sf: bool,
    default_num_sms: Callable[[int, int], int],
) -> DispatchArgs:
    """Check the arguments of a dispatch and resolve their defaults.

    `default_num_sms(num_experts, num_topk)` gives the SM count of a call that names none.

    Raises:
        ConfigError: An argument cannot be taken; says what must hold, what came, the rank, and what to do.
    """
    rank = facts.rank
    sf = None
    if isinstance(x, tuple):
        if len(x) != 2:
            raise rejected(rank, "x must be a tensor or a tuple (x, sf)", f"a tuple of {len(x)}", "pass two tensors")
        x, sf = x
    _check_rows(facts, x)
    if sf is not None:
        _check_sf(facts, x, sf)
    if do_zero_padding and not do_expand:
        raise rejected(rank, "do_zero_padding requires do_expand=True", "do_expand=False", "only expert rows have gaps")

    if handle is not None:
        _check_handle(facts, handle)
        if topk_idx is not None:
            raise rejected(rank, "topk_idx must be None with a handle", "both", "the handle holds the routing")
        if cumulative_local_expert_recv_stats is not None:
            raise rejected(
                rank,
                "cumulative_local_expert_recv_stats must be None with a handle",
                "both",
                "a cached dispatch counts nothing",
            )
        if do_cpu_sync:
            raise rejected(rank, "do_cpu_sync must be None or False with a handle", "True", "its counts are known")
        if do_expand and not handle.do_expand:
            raise rejected(
                rank,
                "a cached dispatch with do_expand=True needs a handle that was made with do_expand=True",
                "a token-major handle",
                "dispatch once with do_expand=True and keep that handle",
            )
        for name, value, kept in (
            ("num_experts", num_experts, handle.num_experts),
            ("num_max_tokens_per_rank", num_max_tokens_per_rank, handle.num_max_tokens_per_rank),
            ("expert_alignment", expert_alignment, handle.expert_alignment),
        ):
            if value is not None and value != kept:
                raise rejected(rank, f"{name} must equal the handle's {kept}", value, "pass None")
        if x.size(0) != handle.num_tokens:
            raise rejected(
                rank,
                f"x must have as many rows as the handle's topk_idx, {handle.num_tokens}",
                x.size(0),
                "the same tokens in the same order",
            )
        topk_idx = handle.topk_idx
        num_experts, num_max_tokens_per_rank = handle.num_experts, handle.num_max_tokens_per_rank
        expert_alignment = handle.expert_alignment
        do_cpu_sync = False
    elif topk_idx is None:
        raise rejected(rank, "dispatch needs topk_idx or a handle", "neither", "pass one of them")

    remedy = "pass it, or make the buffer with it"
    if num_max_tokens_per_rank is None:
        num_max_tokens_per_rank = facts.num_max_tokens_per_rank
    max_tokens = _check_count(
        facts, "num_max_tokens_per_rank", num_max_tokens_per_rank, low=1, high=None, remedy=remedy
    )
    num_experts = _check_count(facts, "num_experts", num_experts, low=1, high=None, remedy="pass the global count")
    if num_experts % facts.num_ranks:
        raise rejected(
            rank, f"num_experts must be a multiple of the {facts.num_ranks} ranks", num_experts, "pad the expert count"
        )
    expert_alignment = 1 if expert_alignment is None else expert_alignment
    expert_alignment = _check_count(
        facts, "expert_alignment", expert_alignment, low=1, high=None, remedy="1 aligns not"
    )
    if x.size(0) > max_tokens:
        raise rejected(
            rank, f"x must have at most num_max_tokens_per_rank = {max_tokens} rows", x.size(0), "raise the bound"
        )
    if isinstance(topk_idx, torch.Tensor) and topk_idx.dim() == 2 and not 1 <= topk_idx.size(1) <= MAX_NUM_TOPK:
        raise rejected(rank, f"num_topk must lie in [1, {MAX_NUM_TOPK}]", topk_idx.size(1), "route to fewer experts")
    num_topk = topk_idx.size(1) if isinstance(topk_idx, torch.Tensor) and topk_idx.dim() == 2 else 1
    shape, shape_text = (x.size(0), num_topk), "[num_tokens, num_topk]"
    _check_tensor(
        facts, "topk_idx", topk_idx, shape=shape, shape_text=shape_text, dtypes=TOPK_IDX_DTYPES, device=x.device
    )
    if facts.num_ranks * max_tokens * max(num_topk, 1) > INT32_MAX:
        raise rejected(
            rank,
            f"num_ranks * num_max_tokens_per_rank * num_topk must be at most {INT32_MAX}",
            f"{facts.num_ranks} * {max_tokens} * {num_topk}",
            "lower num_max_tokens_per_rank",
        )
    if topk_weights is not None:
        _check_tensor(
            facts,
            "topk_weights",
            topk_weights,
            shape=shape,
            shape_text=shape_text,
            dtypes=WEIGHT_DTYPES,
            device=x.device,
        )
    if cumulative_local_expert_recv_stats is not None:
        _check_tensor(
            facts,
            "cumulative_local_expert_recv_stats",
            cumulative_local_expert_recv_stats,
            shape=(num_experts // facts.num_ranks,),
            shape_text="[num_local_experts]",
            dtypes=(torch.int32,),
            device=x.device,
        )
    num_sms, num_qps = _check_resources(facts, num_sms, num_qps)
    if num_sms == 0:
        num_sms = handle.num_sms if handle is not None else default_num_sms(num_experts, num_topk)
    settings = (
        num_experts,
        max_tokens,
        expert_alignment,
        num_sms,
        num_qps,
        bool(do_handle_copy),
        True if do_cpu_sync is None else bool(do_cpu_sync),
        bool(do_expand),
        bool(do_zero_padding),
        bool(use_tma_aligned_col_major_sf),
    )
    kind = CallKind(settings=settings)
    return DispatchArgs(x, sf, topk_idx, topk_weights, cumulative_local_expert_recv_stats, handle, kind, *kind.settings)


def _check_sf(facts: BufferFacts, x: torch.Tensor, sf: Any) -> None:
    max_packs = ceil_div(x.size(1), MIN_CHANNELS_PER_SF_PACK)
    must = (
        f"sf must be [num_tokens, num_packs] = [{x.size(0)}, 1 to {max_packs}] of {SF_PACK_BYTES}-byte elements "
        f"on {x.device}"
    )
    if not isinstance(sf, torch.Tensor):
        raise rejected(facts.rank, must, type(sf).__name__, "pass float32 scales, or four UE8M0 bytes an int32")
    is_right = (
        sf.dim() == 2
        and sf.size(0) == x.size(0)
        and 1 <= sf.size(1) <= max_packs
        and sf.element_size() == SF_PACK_BYTES
        and sf.device == x.device
    )
    if not is_right:
        raise rejected(facts.rank, must, _shown(sf), "pass float32 scales, or four UE8M0 bytes an int32")


def _check_resources(facts: BufferFacts, num_sms: Any, num_qps: Any) -> tuple[int, int]:
    num_sms = _check_count(facts, "num_sms", num_sms, low=0, high=facts.device_num_sms, remedy="0 chooses by the model")
    num_qps = _check_count(
        facts, "num_qps", num_qps, low=0, high=facts.num_allocated_qps, remedy="make the buffer with num_allocated_qps"
    )
    return num_sms, num_qps


def check_topk_values(facts: BufferFacts, topk_idx: torch.Tensor, num_experts: int) -> None:
    """Check that every entry is a known expert or negative, and that no token names an expert twice.

    Stream: on CUDA this waits for `topk_idx` on the host.

    Raises:
        ConfigError: Names the first token that is wrong.
    """
    too_large = topk_idx >= num_experts
    in_order = topk_idx.sort(dim=1).values
    is_repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    bad = too_large.any(1) | is_repeated.any(1)
    if not bool(bad.any()):
        return
    token_idx = int(bad.nonzero()[0, 0])
    row = topk_idx[token_idx].tolist()
    if bool(too_large[token_idx].any()):
        must = f"topk_idx entries must be below num_experts = {num_experts}, or negative for none"
        raise rejected(facts.rank, must, f"{row} for token {token_idx}", "check the router or num_experts")
    must = "a token must name each expert at most once in topk_idx"
    raise rejected(facts.rank, must, f"{row} for token {token_idx}", "set repeated entries to -1 and add their weights")


def check_combine(
    facts: BufferFacts, *, x: Any, handle: Any, topk_weights: Any, bias: Any, num_sms: int, num_qps: int
) -> CombineArgs:
    """Check the arguments of a combine and resolve their defaults.

    Raises:
        ConfigError: An argument cannot be taken; says what must hold, what came, the rank, and what to do.
    """
    rank = facts.rank
    handle = _check_handle(facts, handle)
    _check_rows(facts, x)
    if x.dtype not in COMBINE_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMBINE_DTYPES)
        got = str(x.dtype).removeprefix("torch.")
        raise rejected(rank, f"combine needs x of one of {names}", got, "cast the expert outputs")
    if x.device != handle.device:
        raise rejected(rank, f"x must be on the handle's device {handle.device}", x.device, "move it")
    num_rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
    layout = "expert-major" if handle.do_expand else "token-major"
    if x.size(0) != num_rows:
        raise rejected(
            rank,
            f"x must have the {num_rows} rows of the {layout} dispatch that made the handle",
            x.size(0),
            "pass one row for each received row, padding included",
        )
    if topk_weights is not None:
        if handle.do_expand and not facts.allow_multiple_reduction:
            raise rejected(
                rank,
                "topk_weights must be None for an expert-major handle with allow_multiple_reduction=False",
                "a tensor",
                "apply the weights before, or make the buffer with allow_multiple_reduction=True",
            )
        shape = (num_rows,) if handle.do_expand else (num_rows, handle.num_topk)
        shape_text = "[num_expanded_tokens]" if handle.do_expand else "[num_recv_tokens, num_topk]"
        _check_tensor(
            facts,
            "topk_weights",
            topk_weights,
            shape=shape,
            shape_text=shape_text,
            dtypes=WEIGHT_DTYPES,
            device=x.device,
        )
    if bias is None:
        biases: tuple[Any, ...] = ()
    elif isinstance(bias, torch.Tensor):
        biases = (bias,)
    elif isinstance(bias, tuple) and len(bias) == 2:
        biases = bias
    else:
        got = f"a {type(bias).__name__}" + (f" of {len(bias)}" if isinstance(bias, tuple | list) else "")
        raise rejected(rank, "bias must be None, a tensor, or a tuple of exactly two tensors", got, "add them up first")
    for bias_idx, each in enumerate(biases):
        _check_tensor(
            facts,
            "bias" if len(biases) == 1 else f"bias[{bias_idx}]",
            each,
            shape=(handle.num_tokens, x.size(1)),
            shape_text="[num_tokens, hidden]",
            dtypes=(x.dtype,),
            device=x.device,
        )
    num_sms, num_qps = _check_resources(facts, num_sms, num_qps)
    kind = CallKind(settings=(num_sms or handle.num_sms, num_qps))
    return CombineArgs(x, handle, topk_weights, biases, kind, *kind.settings)
