"""Owns one exchange of rows under way: bytes out, bytes in, and the way between a device and its wire."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from deep_ep_legacy.low_latency_messages import wire_device
from deep_ep_legacy.low_latency_peers import Call, Peers

__all__ = ["RowExchange", "add_wait_ns"]


class RowExchange:
    """Rows to and from the ranks of a call, under way once this is made.

    Args:
        peers: The ranks.
        call: The call that they agreed upon.
        parts: Tensors `[sum(num_send), ...]`, contiguous, of any dtype: the rows for rank 0 first.
        num_send: By rank, rows for it.
        num_recv: By rank, rows from it, as it sends them.

    Collective: yes.
    """

    def __init__(
        self,
        peers: Peers,
        call: Call,
        parts: Sequence[torch.Tensor],
        *,
        num_send: Sequence[int],
        num_recv: Sequence[int],
    ) -> None:
        self._peers, self._call, self._parts = peers, call, parts
        wire = wire_device(peers.transport.group, parts[0].device)
        sent = [_as_bytes(part).to(wire) for part in parts]
        self._received = [rows.new_empty(sum(num_recv), rows.size(1)) for rows in sent]
        self._messages = peers.post(
            call,
            [rows.split(list(num_send)) for rows in sent],
            [rows.split(list(num_recv)) for rows in self._received],
        )

    def complete(self) -> tuple[list[torch.Tensor], dict[int, int]]:
        """Wait for the rows.

        Returns:
            What arrived, one tensor for each part, rows from rank 0 first; and the nanoseconds spent waiting for each
            peer. Rows of a rank that was masked meanwhile are not to be used.

        Raises:
            CommTimeoutError: A peer died or is late, and there is no mask.
        """
        wait_ns = self._peers.wait(self._messages, self._call, "rows")
        received = [
            rows.to(part.device).view(-1).view(part.dtype).view(len(rows), *part.shape[1:])
            for part, rows in zip(self._parts, self._received, strict=True)
        ]
        return received, wait_ns


def add_wait_ns(wait_stats: torch.Tensor | None, wait_ns: dict[int, int]) -> None:
    """Add the time spent waiting for each peer to what the caller gave for it, if he did."""
    if wait_stats is not None:
        waited = [wait_ns.get(rank, 0) for rank in range(len(wait_stats))]
        wait_stats.add_(torch.tensor(waited, device=wait_stats.device))


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    row_bytes = rows.element_size() * math.prod(rows.shape[1:])
    return rows.reshape(-1).view(torch.uint8).view(len(rows), row_bytes)
