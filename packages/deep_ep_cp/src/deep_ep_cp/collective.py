"""Owns the collective backend: slots moved by core's transport, on any `torch.distributed` group.

It is what runs anywhere, and what other backends are compared with. Which arguments ranks must agree on is here too.
"""

from __future__ import annotations

import zlib

import torch

from deep_ep_core.transport import AgreedField, CollectiveTransport, Rows
from deep_ep_cp.backend import SessionCall
from deep_ep_cp.reduction import sum_in_rank_order
from deep_ep_cp.region import bytes_of
from deep_ep_cp.session import SessionConfig

__all__ = ["OPERATIONS", "CollectiveBackend", "agreed_by_call"]

OPERATIONS = ("open", "agrs_set_config", "all_gather", "reduce_scatter")
# Tensors of a batch that are compared one by one; all of them are compared as a whole.
_NUM_SHOWN_TENSORS = 6


def agreed_by_call(call: SessionCall) -> list[AgreedField]:
    """The values of a call that every rank must pass alike; the same fields for any number of tensors."""
    regions = call.regions
    fields = [
        AgreedField(name="session", value=call.session_idx, show=lambda idx: f"number {idx} of this buffer"),
        AgreedField(name="number of tensors", value=len(regions)),
    ]
    for idx in range(_NUM_SHOWN_TENSORS):
        region = regions[idx] if idx < len(regions) else None
        fields += [
            AgreedField(name=f"number of elements of tensor {idx}", value=region.num_elements if region else 0),
            AgreedField.of_dtype(f"dtype of tensor {idx}", region.dtype if region else None),
        ]
    mine = [(list(region.shape), str(region.dtype).removeprefix("torch.")) for region in regions]
    code = zlib.crc32(repr(mine).encode())
    shown = ", ".join(f"{shape} {dtype}" for shape, dtype in mine)
    fields.append(
        AgreedField(name="list of shapes", value=code, show=lambda value: shown if value == code else "others")
    )
    return fields


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
        self._transport.begin(
            "agrs_set_config",
            [
                AgreedField(name="num_max_session_bytes", value=config.max_session_bytes),
                AgreedField(name="num_max_all_gathers_per_session", value=config.max_calls),
            ],
        )

    def all_gather(self, call: SessionCall) -> None:
        """Fill each region with the tensors of all ranks."""
        operation = self._transport.begin("all_gather", agreed_by_call(call))
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
        operation = self._transport.begin("reduce_scatter", agreed_by_call(call))
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

    def close(self) -> None:
        """Nothing is held: the group belongs to the caller, and the memory to the tensors that view it."""
