"""Owns the plan of the device backend: where each token's rows are at their receivers, in device memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from deep_ep_ep.handle import DeferredTensors, PlanParts

__all__ = ["DevicePlan", "RoutingLayout", "RoutingMemory", "routing_layout", "source_order"]

_INT32_BYTES = 4
# The tensors of a plan, in the order in which operators pass them.
_PLAN_NAMES = ("row_of_entry", "expert_row_of_entry", "num_send_rows")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingLayout:
    """Where the tensors of a routing lie in their common memory, which consists of int32 words.

    Attributes:
        num_words: Size of the memory.
        begins: First word of each tensor.
        shapes: Its shape.
        offsets: Where each begins, in bytes.
        topk_idx_dtype: Dtype of the copy of `topk_idx`; all else is int32.
    """

    num_words: int
    begins: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    offsets: Mapping[str, int]
    topk_idx_dtype: torch.dtype


# Calls of one kind may have any number of tokens.
@functools.lru_cache(maxsize=1024)
def routing_layout(
    num_ranks: int,
    num_local_experts: int,
    num_tokens: int,
    num_topk: int,
    num_metadata_rows: int,
    num_scratch: int,
    copied_dtype: torch.dtype | None,
    do_expand: bool,
) -> RoutingLayout:
    """The layout of a routing.

    Args:
        num_ranks: Ranks of the group.
        num_local_experts: Experts of this rank.
        num_tokens: Tokens of this rank.
        num_topk: Entries of a token's routing.
        num_metadata_rows: Rows of the metadata; 0 where it has memory of its own.
        num_scratch: Numbers that only the kernel needs.
        copied_dtype: Dtype of `topk_idx`; None where it is not copied.
        do_expand: Whether there are rows by expert.
    """
    shapes: dict[str, tuple[int, ...]] = {
        # First, since its elements may have two words.
        "topk_idx": (0 if copied_dtype is None else num_tokens, num_topk),
        "psum_num_recv_tokens_per_scaleup_rank": (num_ranks,),
        "psum_num_recv_tokens_per_expert": (num_local_experts,),
        "num_unaligned_recv_tokens_per_expert": (num_local_experts,),
        "num_send_rows": (num_ranks,),
        "dst_buffer_slot_idx": (num_tokens, num_topk),
        "row_of_entry": (num_tokens, num_topk),
        "expert_row_of_entry": (num_tokens if do_expand else 0, num_topk),
        "recv_src_metadata": (num_metadata_rows, num_topk + 2),
        "scratch": (num_scratch,),
    }
    topk_idx_dtype = torch.int32 if copied_dtype is None else copied_dtype
    begins, end = {}, 0
    for name, shape in shapes.items():
        begins[name] = end
        words_each = topk_idx_dtype.itemsize // _INT32_BYTES if name == "topk_idx" else 1
        end += words_each * math.prod(shape)
    return RoutingLayout(
        num_words=end,
        begins=begins,
        shapes=shapes,
        offsets={name: _INT32_BYTES * begin for name, begin in begins.items()},
        topk_idx_dtype=topk_idx_dtype,
    )


class RoutingMemory:
    """The tensors of one routing, in one allocation, since to make each by itself would take the host longer.

    Args:
        layout: Where each is.
        storage: The memory, `[layout.num_words]` int32.

    Attributes:
        storage: See above.
        address: Where it begins.
        separate: Tensors that have memory of their own instead.
    """

    __slots__ = ("_layout", "_num_metadata_rows", "address", "separate", "storage")

    def __init__(self, layout: RoutingLayout, storage: torch.Tensor) -> None:
        self._layout = layout
        self._num_metadata_rows: int | None = None
        self.storage = storage
        self.address: int = storage.data_ptr()
        self.separate: dict[str, torch.Tensor] = {}

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor whose memory these are."""
        return self.storage, *self.separate.values()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name: one with memory of its own, or a view."""
        if name in self.separate:
            return self.separate[name]
        layout = self._layout
        begin, shape = layout.begins[name], layout.shapes[name]
        if name == "recv_src_metadata" and self._num_metadata_rows is not None:
            shape = self._num_metadata_rows, *shape[1:]
        dtype = layout.topk_idx_dtype if name == "topk_idx" else torch.int32
        num_words = math.prod(shape) * (dtype.itemsize // _INT32_BYTES)
        return self.storage[begin : begin + num_words].view(dtype).view(shape)

    def shrink_metadata(self, num_rows: int) -> None:
        """The metadata has only so many rows, fewer than there is room for."""
        self._num_metadata_rows = num_rows

    def address_of(self, name: str) -> int:
        """Where it begins."""
        if name in self.separate:
            return self.separate[name].data_ptr()
        return self.address + self._layout.offsets[name]


class _SeparateTensors:
    """Tensors that are there already."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def address_of(self, name: str) -> int:
        return self._tensors[name].data_ptr()


@dataclass(slots=True, kw_only=True, eq=False)
class DevicePlan:
    """What a combine or a cached dispatch needs of a dispatch. Made at every dispatch, so not frozen.

    Attributes:
        ints: Three tensors of int32. "row_of_entry" `[num_tokens, num_topk]`: the token's row among the received ones
            of that entry's rank, at the last entry of each rank; -1 elsewhere. "expert_row_of_entry" `[num_tokens,
            num_topk]`: row in the expert-major tensors of that entry's rank, or -1; no rows of a token-major dispatch.
            "num_send_rows" `[num_ranks]`: rows sent to each rank.
        owned: The tensors whose memory these are.
        metadata_address: Where the kernel wrote the metadata. A handle with metadata elsewhere has permuted rows.
        metadata_version: Counts in-place changes of it at that time, as torch does; -1 where torch does not.
    """

    ints: DeferredTensors
    owned: tuple[torch.Tensor, ...]
    metadata_address: int
    metadata_version: int

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        return list(self.owned)

    def parts(self, metadata: torch.Tensor) -> PlanParts:
        """See `Plan`. A copy that was made in an operator counts as changed in place once, so its count is its own."""
        return PlanParts(tensors=[self.ints.tensor(name) for name in _PLAN_NAMES], numbers=[version_of(metadata)])

    @classmethod
    def of_parts(cls, parts: PlanParts, metadata: torch.Tensor) -> DevicePlan:
        """See `Plan`. Rows lie as the kernel laid them unless the metadata was changed in place since."""
        (metadata_version,) = parts.numbers
        return cls(
            ints=_SeparateTensors(dict(zip(_PLAN_NAMES, parts.tensors, strict=True))),
            owned=(*parts.tensors, metadata),
            metadata_address=metadata.data_ptr(),
            metadata_version=metadata_version,
        )

    @classmethod
    def new_parts(
        cls, topk_idx: torch.Tensor, *, num_ranks: int, do_expand: bool, new_size: Callable[[], int]
    ) -> PlanParts:
        """See `Plan`."""
        num_tokens, num_topk = topk_idx.shape
        shapes = [(num_tokens, num_topk), (num_tokens if do_expand else 0, num_topk), (num_ranks,)]
        return PlanParts(tensors=[topk_idx.new_empty(shape, dtype=torch.int32) for shape in shapes], numbers=[0])

    def has_row_order(self, metadata: torch.Tensor) -> bool:
        """Whether rows that come with this metadata lie as the dispatch laid them."""
        return metadata.data_ptr() == self.metadata_address and version_of(metadata) == self.metadata_version


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 for an inference tensor, whose changes torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


def source_order(metadata: torch.Tensor, recv_row_ends: torch.Tensor) -> torch.Tensor:
    """The order in which permuted rows lie as the dispatch laid them, by (source rank, token).

    Args:
        metadata: `[num_recv_tokens, num_topk + 2]` int32, permuted with the rows.
        recv_row_ends: `[num_ranks]` int32: inclusive prefix sum of the rows received from each rank. Rows behind the
            last of these have no source, and come last.

    Returns:
        `[num_recv_tokens]` int64, for `index_select`.

    Stream: runs on the current one; the host waits for nothing.
    """
    is_real = torch.arange(len(metadata), device=metadata.device) < recv_row_ends[-1]
    return torch.where(is_real, metadata[:, 0], torch.iinfo(torch.int32).max).argsort(stable=True)
