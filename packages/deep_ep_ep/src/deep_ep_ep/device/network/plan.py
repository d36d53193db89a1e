"""Owns the plan of a dispatch across nodes: where each token's rows are at their receivers and on the way to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deep_ep_ep.device.network.dispatch_kernels import NUM_RELAY_COUNTS, forward_table_words
from deep_ep_ep.device.plan import version_of
from deep_ep_ep.handle import PlanParts

__all__ = ["NetworkPlan"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NetworkPlan:
    """What a combine or a cached dispatch needs of a dispatch. All tensors are int32 on the device.

    T is the number of this rank's tokens, K `num_topk`, N the number of ranks. Relays are those of `network.cuh`.

    Attributes:
        row_of_entry: `[T, K]`: the token's row among the received ones of that entry's rank, at the last entry of each
            rank; -1 elsewhere.
        expert_row_of_entry: `[T, K]`: row in the expert-major tensors of that entry's rank, or -1; no rows of a
            token-major dispatch.
        slot_of_entry: `[T, K]`: the token's place among those for that entry's relay, at the last entry of each relay;
            -1 elsewhere.
        sent_tokens: `[T, K]`, filled from the front: the tokens for each relay, one relay behind the other.
        num_send_rows: `[N]`: rows for each rank.
        recv_row_ends: `[N]`: inclusive prefix sum of the rows received from each rank.
        relay_counts: `[4, N]`: see `RelayCount` in `network/dispatch_params.cuh`.
        forward_table: `[num_relays * max_tokens, 2 * K + 1]`: where this rank, as a relay, finds the rows that it
            handed on; see `network/place_rows.cuh`.
        metadata: `recv_src_metadata` as the kernels wrote it.
        metadata_version: Counts in-place changes of it at that time, as torch does; -1 where torch does not.
    """

    row_of_entry: torch.Tensor
    expert_row_of_entry: torch.Tensor
    slot_of_entry: torch.Tensor
    sent_tokens: torch.Tensor
    num_send_rows: torch.Tensor
    recv_row_ends: torch.Tensor
    relay_counts: torch.Tensor
    forward_table: torch.Tensor
    metadata: torch.Tensor
    metadata_version: int

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)[:-1]]

    def parts(self, metadata: torch.Tensor) -> PlanParts:
        """See `Plan`. A copy that was made in an operator counts as changed in place once, so its count is its own."""
        return PlanParts(tensors=self.tensors()[:-1], numbers=[version_of(metadata)])

    @classmethod
    def of_parts(cls, parts: PlanParts, metadata: torch.Tensor) -> NetworkPlan:
        """See `Plan`. Rows lie as the kernels laid them unless the metadata was changed in place since."""
        names = [field.name for field in dataclasses.fields(cls)[:-2]]
        (metadata_version,) = parts.numbers
        tensors = dict(zip(names, parts.tensors, strict=True))
        return cls(**tensors, metadata=metadata, metadata_version=metadata_version)

    @classmethod
    def new_parts(
        cls, topk_idx: torch.Tensor, *, num_ranks: int, do_expand: bool, new_size: Callable[[], int]
    ) -> PlanParts:
        """See `Plan`."""
        num_tokens, num_topk = topk_idx.shape
        of_entries = (num_tokens, num_topk)
        shapes = [
            of_entries,
            (num_tokens if do_expand else 0, num_topk),
            of_entries,
            of_entries,
            (num_ranks,),
            (num_ranks,),
            (NUM_RELAY_COUNTS, num_ranks),
            (new_size(), forward_table_words(num_topk)),
        ]
        return PlanParts(tensors=[topk_idx.new_empty(shape, dtype=torch.int32) for shape in shapes], numbers=[0])

    def has_row_order(self, metadata: torch.Tensor) -> bool:
        """Whether rows that come with this metadata lie as the dispatch laid them."""
        is_same = metadata.data_ptr() == self.metadata.data_ptr()
        return is_same and version_of(metadata) == self.metadata_version
