"""Owns the checks of V1's normal calls: every argument, before anything is sent, in words that help.

Only `check_counts` reads what lies in tensors, and so waits for a device; backends that can compare counts there do not
need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deep_ep_core.refusals import rejected
from deep_ep_core.stream import EventHandle, EventOverlap, StreamOptions
from deep_ep_legacy.config import Config
from deep_ep_legacy.handles import Handle, as_handle, num_rows_of

__all__ = [
    "BufferFacts",
    "CombineArgs",
    "DispatchArgs",
    "check_capture",
    "check_combine",
    "check_counts",
    "check_dispatch",
    "check_layout",
    "check_streams",
]

_ROW_UNIT_BYTES = 16
# Of a token; V1's kernels take as many.
_MAX_TOPK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferFacts:
    """What the checks know of a buffer: this rank, the ranks of its group, and how they are spread over nodes."""

    rank: int
    num_ranks: int
    num_nodes: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchArgs:
    """A dispatch that passed the checks.

    Attributes:
        x, sf: The rows, and their scales or None.
        is_token_in_rank: `[num_tokens, num_ranks]` bool: the routing.
        num_tokens_per_rank: `[num_ranks]`; None with a handle.
        num_tokens_per_rdma_rank: `[num_nodes]`, with several nodes; None with a handle.
        num_tokens_per_expert: `[num_experts]`; None with a handle.
        topk_idx, topk_weights: Both, or None for both.
        expert_alignment: The counts of experts are rounded up to it.
        num_worst_tokens: Rows of the results, or 0 for as many as arrive.
        config: Its SMs say how many channels a new handle tells, and what kernels may take.
        handle: Of a cached dispatch; None otherwise.
    """

    x: torch.Tensor
    sf: torch.Tensor | None
    is_token_in_rank: torch.Tensor
    num_tokens_per_rank: torch.Tensor | None
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    expert_alignment: int
    num_worst_tokens: int
    config: Config
    handle: Handle | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombineArgs:
    """A combine that passed the checks."""

    x: torch.Tensor
    topk_weights: torch.Tensor | None
    biases: Sequence[torch.Tensor]
    config: Config
    handle: Handle


def _shown(value: Any) -> str:
    """A value for a message: of a tensor its shape, dtype, layout and device."""
    if not isinstance(value, torch.Tensor):
        return f"{value!r}" if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
    layout = "" if value.is_contiguous() else f" with strides {list(value.stride())}"
    return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}{layout} on {value.device}"


def _check_tensor(
    facts: BufferFacts,
    name: str,
    tensor: Any,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """A contiguous tensor of that shape (a text stands for any size), one of the dtypes, on the device."""
    is_right = (
        isinstance(tensor, torch.Tensor)
        and tensor.dim() == len(shape)
        and all(isinstance(want, str) or want == size for want, size in zip(shape, tensor.shape, strict=True))
        and (not dtypes or tensor.dtype in dtypes)
        and tensor.is_contiguous()
        and (device is None or tensor.device == device)
    )
    if not is_right:
        wanted = f"[{', '.join(map(str, shape))}] {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
        where = "" if device is None else f", on {device}"
        raise rejected(
            facts.rank,
            f"{name} must be {wanted.rstrip()}, contiguous{where}",
            _shown(tensor),
            "cast it, move it, or call .contiguous()",
        )


def _check_count(facts: BufferFacts, name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise rejected(facts.rank, f"{name} must be an integer >= {minimum}", _shown(value), "pass another")


def check_layout(facts: BufferFacts, topk_idx: Any, num_experts: Any) -> None:
    """The arguments of `get_dispatch_layout`.

    Raises:
        ConfigError: One cannot be taken.
    """
    _check_tensor(facts, "topk_idx", topk_idx, ["num_tokens", "num_topk"], [torch.int64, torch.int32])
    _check_count(facts, "num_experts", num_experts, 1)
    _check_shared_out(facts, num_experts)


def _check_shared_out(facts: BufferFacts, num_experts: int) -> None:
    if num_experts < 1 or num_experts % facts.num_ranks != 0:
        raise rejected(
            facts.rank,
            f"num_experts must be a multiple of the {facts.num_ranks} ranks",
            num_experts,
            "add experts that no token names",
        )


def check_dispatch(
    facts: BufferFacts,
    *,
    x: Any,
    handle: Any,
    num_tokens_per_rank: Any,
    num_tokens_per_rdma_rank: Any,
    is_token_in_rank: Any,
    num_tokens_per_expert: Any,
    topk_idx: Any,
    topk_weights: Any,
    expert_alignment: Any,
    num_worst_tokens: Any,
    config: Any,
    default_config: Config,
) -> DispatchArgs:
    """The arguments of `dispatch`.

    Raises:
        ConfigError: One cannot be taken.
    """
    x, sf = _check_rows(facts, x)
    _check_count(facts, "expert_alignment", expert_alignment, 1)
    _check_count(facts, "num_worst_tokens", num_worst_tokens, 0)
    config = _checked_config(facts, config, default_config)
    if handle is not None:
        if topk_idx is not None or topk_weights is not None:
            raise rejected(
                facts.rank, "topk_idx and topk_weights must be None with a handle", "one of them", "leave them out"
            )
        known = _checked_handle(facts, handle, x.device)
        if len(x) != len(known.is_token_in_rank):
            raise rejected(
                facts.rank,
                f"x must have as many rows as the dispatch that made the handle, {len(known.is_token_in_rank)}",
                len(x),
                "pass the handle of that dispatch",
            )
        return DispatchArgs(
            x=x,
            sf=sf,
            is_token_in_rank=known.is_token_in_rank,
            num_tokens_per_rank=None,
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=None,
            topk_idx=None,
            topk_weights=None,
            expert_alignment=expert_alignment,
            num_worst_tokens=0,
            config=config,
            handle=known,
        )
    num_ranks, device = facts.num_ranks, x.device
    _check_tensor(facts, "is_token_in_rank", is_token_in_rank, [len(x), num_ranks], [torch.bool], device)
    _check_tensor(facts, "num_tokens_per_rank", num_tokens_per_rank, [num_ranks], [torch.int32], device)
    _check_tensor(facts, "num_tokens_per_expert", num_tokens_per_expert, ["num_experts"], [torch.int32], device)
    _check_shared_out(facts, len(num_tokens_per_expert))
    if facts.num_nodes > 1:
        name = "num_tokens_per_rdma_rank"
        _check_tensor(facts, name, num_tokens_per_rdma_rank, [facts.num_nodes], [torch.int32], device)
    _check_topk(facts, topk_idx, topk_weights, len(x), device)
    if num_worst_tokens and topk_idx is None:
        raise rejected(
            facts.rank, "num_worst_tokens needs topk_idx and topk_weights", "neither", "pass them, or leave it out"
        )
    if num_worst_tokens and facts.num_nodes > 1:
        raise rejected(
            facts.rank, "num_worst_tokens must be 0 with several nodes", num_worst_tokens, "leave it out, as V1 asks"
        )
    return DispatchArgs(
        x=x,
        sf=sf,
        is_token_in_rank=is_token_in_rank,
        num_tokens_per_rank=num_tokens_per_rank,
        num_tokens_per_rdma_rank=num_tokens_per_rdma_rank if facts.num_nodes > 1 else None,
        num_tokens_per_expert=num_tokens_per_expert,
        topk_idx=topk_idx,
        topk_weights=topk_weights,
        expert_alignment=expert_alignment,
        num_worst_tokens=num_worst_tokens,
        config=config,
        handle=None,
    )


def check_counts(facts: BufferFacts, args: DispatchArgs) -> None:
    """The counts that came with a new routing, against the routing. Waits for them where they lie on a device.

    Raises:
        ConfigError: They differ: the rows follow the routing and the counts tell the peers, so ranks would wait for
            ever.
    """
    routing, num_nodes = args.is_token_in_rank, facts.num_nodes
    claims = [("num_tokens_per_rank", args.num_tokens_per_rank, routing)]
    if args.num_tokens_per_rdma_rank is not None:
        is_per_node = routing.view(-1, num_nodes, facts.num_ranks // num_nodes).any(2)
        claims.append(("num_tokens_per_rdma_rank", args.num_tokens_per_rdma_rank, is_per_node))
    for name, counts, selected in claims:
        if counts is not None and not torch.equal(counts.long(), selected.sum(0)):
            raise rejected(
                facts.rank,
                f"{name} must count the tokens of is_token_in_rank, {selected.sum(0).tolist()}",
                counts.tolist(),
                "pass both as get_dispatch_layout returned them",
            )


def check_capture(facts: BufferFacts, *, handle: Any, num_worst_tokens: Any) -> None:
    """Whether a dispatch may be captured, if a CUDA graph is being captured on the current stream.

    Raises:
        ConfigError: The host would wait for counts, which do not come before the graph runs.
    """
    waits = handle is None and num_worst_tokens == 0
    if waits and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise rejected(
            facts.rank,
            "a dispatch that a CUDA graph captures must have num_worst_tokens or a handle",
            "neither",
            "pass one: otherwise the host waits for counts",
        )


def _check_rows(facts: BufferFacts, x: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows, sf = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    _check_tensor(facts, "x", rows, ["num_tokens", "hidden"], [])
    row_bytes = rows.size(1) * rows.element_size()
    if row_bytes == 0 or row_bytes % _ROW_UNIT_BYTES != 0:
        raise rejected(
            facts.rank,
            f"a row of x must be a positive multiple of {_ROW_UNIT_BYTES} bytes",
            row_bytes,
            "pad the hidden size",
        )
    if sf is None and rows is x:
        return rows, None
    is_right = (
        isinstance(sf, torch.Tensor)
        and rows.element_size() == 1
        and sf.dim() == 2
        and len(sf) == len(rows)
        and sf.dtype in (torch.float32, torch.int32)
        and sf.device == rows.device
    )
    if not is_right:
        raise rejected(
            facts.rank,
            f"the scales of x must be [{len(rows)}, num_scales] float32 or int32 beside rows of one-byte elements, "
            f"on {rows.device}",
            f"{_shown(sf)} beside {_shown(rows)}",
            "pass x as (rows, scales), or rows alone",
        )
    return rows, sf


def _check_topk(facts: BufferFacts, topk_idx: Any, topk_weights: Any, num_tokens: int, device: torch.device) -> None:
    if (topk_idx is None) != (topk_weights is None):
        raise rejected(
            facts.rank, "topk_idx and topk_weights must be given together", "one of them", "pass both, or neither"
        )
    if topk_idx is None:
        return
    _check_tensor(facts, "topk_idx", topk_idx, [num_tokens, "num_topk"], [torch.int64, torch.int32], device)
    if not 1 <= topk_idx.size(1) <= _MAX_TOPK:
        raise rejected(facts.rank, f"num_topk must lie in [1, {_MAX_TOPK}]", topk_idx.size(1), "name fewer experts")
    _check_tensor(facts, "topk_weights", topk_weights, list(topk_idx.shape), [torch.float32], device)


def _checked_config(facts: BufferFacts, config: Any, default: Config) -> Config:
    if config is not None and not isinstance(config, Config):
        raise rejected(facts.rank, "config must be a deep_ep_legacy.Config or None", _shown(config), "make a Config")
    return default if config is None else config


def _checked_handle(facts: BufferFacts, handle: Any, device: torch.device) -> Handle:
    known = as_handle(handle, num_ranks=facts.num_ranks, num_nodes=facts.num_nodes)
    if known is None or known.is_token_in_rank.device != device:
        length = f" of {len(handle)} items" if isinstance(handle, (tuple, list)) else ""
        raise rejected(
            facts.rank,
            f"handle must be what dispatch returned to {facts.num_ranks} ranks on {facts.num_nodes} nodes, on {device}",
            f"{type(handle).__name__}{length}",
            "pass the fifth item that dispatch returned",
        )
    return known


def check_combine(
    facts: BufferFacts, *, x: Any, handle: Any, topk_weights: Any, bias: Any, config: Any, default_config: Config
) -> CombineArgs:
    """The arguments of `combine`.

    Raises:
        ConfigError: One cannot be taken.
    """
    _check_tensor(facts, "x", x, ["num_recv_tokens", "hidden"], [torch.bfloat16])
    _check_rows(facts, x)
    config = _checked_config(facts, config, default_config)
    known = _checked_handle(facts, handle, x.device)
    num_rows = num_rows_of(known)
    _check_tensor(facts, "x", x, [num_rows, "hidden"], [torch.bfloat16])
    if topk_weights is not None:
        _check_tensor(facts, "topk_weights", topk_weights, [num_rows, "num_topk"], [torch.float32], x.device)
    biases = [] if bias is None else [bias] if isinstance(bias, torch.Tensor) else bias
    if not isinstance(biases, (list, tuple)) or len(biases) > 2:
        raise rejected(facts.rank, "bias must be a tensor, two tensors or None", _shown(bias), "add them up before")
    combined_shape = (len(known.is_token_in_rank), x.size(1))
    for tensor in biases:
        _check_tensor(facts, "bias", tensor, list(combined_shape), [torch.bfloat16], x.device)
    return CombineArgs(x=x, topk_weights=topk_weights, biases=tuple(biases), config=config, handle=known)


def check_streams(
    facts: BufferFacts, previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool
) -> StreamOptions:
    """The arguments of streams and events. An `EventOverlap` without an event counts as none, as in V1.

    Raises:
        ConfigError: One cannot be taken.
    """
    if isinstance(previous_event, EventOverlap) and previous_event.event is None:
        previous_event = None
    if previous_event is not None and not isinstance(previous_event, (EventHandle, EventOverlap)):
        raise rejected(
            facts.rank,
            "previous_event must be an EventOverlap, an EventHandle or None",
            _shown(previous_event),
            "pass what Buffer.capture() or an asynchronous call returned",
        )
    if allocate_on_comm_stream and (previous_event is None or not async_finish):
        raise rejected(
            facts.rank,
            "allocate_on_comm_stream=True needs a previous_event and async_finish=True",
            f"previous_event={previous_event!r}, async_finish={async_finish!r}",
            "pass both, or leave it out",
        )
    return StreamOptions(
        previous_event=previous_event,
        async_with_compute_stream=bool(async_finish),
        allocate_on_comm_stream=bool(allocate_on_comm_stream),
    )
