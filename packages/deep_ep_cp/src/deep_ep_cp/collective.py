"""Owns the collective backend: slots moved by core's transport, on any `torch.distributed` group.

It is what runs anywhere, and what other backends are compared with.
"""

from __future__ import annotations

import torch

from deep_ep_core.transport import CollectiveTransport, Rows
from deep_ep_cp.agreed import SET_CONFIG, agreed_by_call, agreed_by_config
from deep_ep_cp.backend import SessionCall
from deep_ep_cp.reduction import sum_in_rank_order
from deep_ep_cp.region import bytes_of
from deep_ep_cp.session import SessionConfig

__all__ = ["CollectiveBackend"]


class CollectiveBackend:
    """Moves slots with point-to-point messages, between tensors in ordinary memory.

    Args:
        transport: Row exchanges of the group.
        memory: Flat uint8, where regions lie.
    """

    name = "collective"

    def __init__(self, transport: CollectiveTransport, memory: torch.Tensor) -> None:
        self._transport = transport
        self.memory = memory

    def set_config(self, config: SessionConfig) -> None:
        """Compare the configuration with that of the other ranks."""
        self._transport.begin(SET_CONFIG, agreed_by_config(config))

    def check(self) -> None:
        """Nothing to do: a call has told of its failures by the time it returns."""

    def all_gather(self, call: SessionCall) -> None:
        """Fill each region with the tensors of all ranks."""
        operation = self._transport.begin("all_gather", agreed_by_call(call.session_idx, call.regions))
        rank, num_ranks = self._transport.rank, self._transport.num_ranks
        gathered = []
        for tensor, region, is_in_place in zip(call.tensors, call.regions, call.is_in_place, strict=True):
            if region.slot_bytes:
                slots = region.slots(self.memory)
                if not is_in_place:
                    slots[rank : rank + 1].copy_(bytes_of(tensor, 1))
                gathered.append(slots)
        # The transport sends each row to one peer. One peer after the other needs no copy of the tensors for each.
        for step in range(1, num_ranks):
            dst, src = (rank + step) % num_ranks, (rank - step) % num_ranks
            operation.exchange(
                [Rows(slots[rank : rank + 1], slots[src : src + 1]) for slots in gathered],
                [int(peer == dst) for peer in range(num_ranks)],
                [int(peer == src) for peer in range(num_ranks)],
                f"slots, step {step} of {num_ranks - 1}",
            )

    def reduce_scatter(self, call: SessionCall) -> list[torch.Tensor]:
        """Sum, for each tensor, what the ranks pass for this rank."""
        operation = self._transport.begin("reduce_scatter", agreed_by_call(call.session_idx, call.regions))
        num_ranks = self._transport.num_ranks
        one_each = [1] * num_ranks
        operation.exchange(
            [
                Rows(bytes_of(tensor, num_ranks), region.slots(self.memory))
                for tensor, region in zip(call.tensors, call.regions, strict=True)
                if region.slot_bytes
            ],
            one_each,
            one_each,
            "addends",
        )
        return [sum_in_rank_order(region.view(self.memory)) for region in call.regions]

    def end_session(self, session_idx: int) -> None:
        """Nothing to do: only this rank writes to its memory, on a stream that has waited for its readers."""

    def report_rejection(self, call: str, reason: str) -> None:
        """Tell the peers that this rank refuses a call."""
        self._transport.report_rejection(call, reason)

    def abandon(self) -> None:
        """Nothing waits: calls have returned."""

    def close(self) -> None:
        """Nothing is held: the group belongs to the caller, and the memory to the tensors that view it."""
