"""Owns the plan of the device backend: where each token's rows are at their receivers, in device memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from deep_ep_ep.handle import DeferredTensors, PlanParts

__all__ = ["DevicePlan", "RoutingMemory"]

_INT32_BYTES = 4
# The tensors of a plan, in the order in which operators pass them.
_PLAN_NAMES = ("row_of_entry", "expert_row_of_entry", "num_send_rows")


class RoutingMemory:
    """The int32 tensors of one routing, in one allocation, since to make each by itself would take the host longer.

    Args:
        device: Where they are.
        num_ranks: Ranks of the group.
        num_local_experts: Experts of this rank.
        num_tokens: Tokens of this rank.
        num_topk: Entries of a token's routing.
        do_expand: Whether there are rows by expert.
        num_scratch: Numbers that only the kernel needs.

    Attributes:
        storage: All of them, flat.
    """

    __slots__ = ("_address", "_places", "storage")

    def __init__(
        self,
        device: torch.device,
        *,
        num_ranks: int,
        num_local_experts: int,
        num_tokens: int,
        num_topk: int,
        do_expand: bool,
        num_scratch: int,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {
            "psum_num_recv_tokens_per_scaleup_rank": (num_ranks,),
            "psum_num_recv_tokens_per_expert": (num_local_experts,),
            "num_unaligned_recv_tokens_per_expert": (num_local_experts,),
            "num_send_rows": (num_ranks,),
            "dst_buffer_slot_idx": (num_tokens, num_topk),
            "row_of_entry": (num_tokens, num_topk),
            "expert_row_of_entry": (num_tokens if do_expand else 0, num_topk),
            "scratch": (num_scratch,),
        }
        places, end = {}, 0
        for name, shape in shapes.items():
            places[name] = end, shape
            end += math.prod(shape)
        self._places = places
        self.storage = torch.empty(end, dtype=torch.int32, device=device)
        self._address: int = self.storage.data_ptr()

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name, a view."""
        begin, shape = self._places[name]
        return self.storage[begin : begin + math.prod(shape)].view(shape)

    def address_of(self, name: str) -> int:
        """Where it begins."""
        return self._address + _INT32_BYTES * self._places[name][0]


class _SeparateTensors:
    """Tensors that are there already."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def address_of(self, name: str) -> int:
        return self._tensors[name].data_ptr()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DevicePlan:
    """What a combine or a cached dispatch needs of a dispatch.

    Attributes:
        ints: Three tensors of int32. "row_of_entry" `[num_tokens, num_topk]`: the token's row among the received ones
            of that entry's rank, at the last entry of each rank; -1 elsewhere. "expert_row_of_entry" `[num_tokens,
            num_topk]`: row in the expert-major tensors of that entry's rank, or -1; no rows of a token-major dispatch.
            "num_send_rows" `[num_ranks]`: rows sent to each rank.
        owned: The tensors whose memory these are.
        metadata: The metadata as the kernel wrote it. A handle that carries another tensor carries permuted rows.
        metadata_version: Counts in-place changes of it at that time, as torch does; -1 where torch does not.
    """

    ints: DeferredTensors
    owned: tuple[torch.Tensor, ...]
    metadata: torch.Tensor
    metadata_version: int

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        return [*self.owned, self.metadata]

    def parts(self) -> PlanParts:
        """See `Plan`. The metadata is the handle's, which must be as the kernel wrote it when this is called."""
        return PlanParts(tensors=[self.ints.tensor(name) for name in _PLAN_NAMES], numbers=[self.metadata_version])

    @classmethod
    def of_parts(cls, parts: PlanParts, metadata: torch.Tensor) -> DevicePlan:
        """See `Plan`. Rows lie as the kernel laid them unless the metadata was changed in place since."""
        (metadata_version,) = parts.numbers
        return cls(
            ints=_SeparateTensors(dict(zip(_PLAN_NAMES, parts.tensors, strict=True))),
            owned=tuple(parts.tensors),
            metadata=metadata,
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
        return metadata.data_ptr() == self.metadata.data_ptr() and version_of(metadata) == self.metadata_version


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was changed in place; -1 for an inference tensor, whose changes torch does not count."""
    return -1 if tensor.is_inference() else tensor._version
