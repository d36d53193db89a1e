"""Owns the contract between `ContextBuffer` and what moves its bytes. Every backend gives the same results.

Two backends fit it: `collective` moves slots with the transport of core, on any group; `device` by the copy engines,
into windows of the peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from deep_ep_cp.region import Region
from deep_ep_cp.session import SessionConfig

__all__ = ["Backend", "SessionCall"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SessionCall:
    """One call in a session, after the checks.

    Attributes:
        session_idx: Number of the session, from 1; the same on every rank.
        call_idx: Number of the call in it, from 0; the same on every rank.
        tensors: What this rank passes; contiguous.
        regions: Where each is gathered, or its addends arrive.
        is_in_place: Whether each is this rank's slot of its region already.
    """

    session_idx: int
    call_idx: int
    tensors: Sequence[torch.Tensor]
    regions: Sequence[Region]
    is_in_place: Sequence[bool]


class Backend(Protocol):
    """Moves slots between ranks. Arguments have passed the checks. The communication stream is current.

    Attributes:
        name: What messages call it.
        memory: This rank's memory, flat uint8; regions are offsets in it.
    """

    name: str
    memory: torch.Tensor

    def set_config(self, config: SessionConfig) -> None:
        """Prepare for sessions of this size; collective."""

    def check(self) -> None:
        """Raise what earlier calls found out since they returned; before a call enqueues anything. Blocks no host."""

    def all_gather(self, call: SessionCall) -> None:
        """Fill each region with the tensors of all ranks; collective."""

    def reduce_scatter(self, call: SessionCall) -> list[torch.Tensor]:
        """Sum, for each tensor, what the ranks pass for this rank, as `sum_in_rank_order` does; collective."""

    def end_session(self, session_idx: int) -> None:
        """Let no rank overwrite a region before this rank's current stream is done with it; collective, blocks no host.

        The caller's stream is current.
        """

    def report_rejection(self, call: str, reason: str) -> None:
        """Tell the peers that this rank refuses a call, if there is a way to."""

    def abandon(self) -> None:
        """Wait for no peer any more, on the host or in streams: what is under way is undefined. Before `close`."""

    def close(self) -> None:
        """Release what the backend holds; not collective, may be called more than once."""
