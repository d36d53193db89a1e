"""Owns the plan of the device backend: where each token's rows are at their receivers, in device memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from deep_ep_ep.handle import PlanParts

__all__ = ["DevicePlan"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DevicePlan:
    """What a combine or a cached dispatch needs of a dispatch.

    Attributes:
        row_of_entry: `[num_tokens, num_topk]` int32: the token's row among the received ones of that entry's rank, at
            the last entry of each rank; -1 elsewhere.
        expert_row_of_entry: `[num_tokens, num_topk]` int32: row in the expert-major tensors of that entry's rank, or
            -1; no rows of a token-major dispatch.
        num_send_rows: `[num_ranks]` int32: rows sent to each rank.
        metadata: The metadata as the kernel wrote it. A handle that carries another tensor carries permuted rows.
        metadata_version: Counts in-place changes of it at that time, as torch does; -1 where torch does not.
    """

    row_of_entry: torch.Tensor
    expert_row_of_entry: torch.Tensor
    num_send_rows: torch.Tensor
    metadata: torch.Tensor
    metadata_version: int

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        return [self.row_of_entry, self.expert_row_of_entry, self.num_send_rows, self.metadata]

    def parts(self) -> PlanParts:
        """See `Plan`. The metadata is the handle's, which must be as the kernel wrote it when this is called."""
        return PlanParts(
            tensors=[self.row_of_entry, self.expert_row_of_entry, self.num_send_rows], numbers=[self.metadata_version]
        )

    @classmethod
    def of_parts(cls, parts: PlanParts, metadata: torch.Tensor) -> DevicePlan:
        """See `Plan`. Rows lie as the kernel laid them unless the metadata was changed in place since."""
        row_of_entry, expert_row_of_entry, num_send_rows = parts.tensors
        (metadata_version,) = parts.numbers
        return cls(
            row_of_entry=row_of_entry,
            expert_row_of_entry=expert_row_of_entry,
            num_send_rows=num_send_rows,
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
