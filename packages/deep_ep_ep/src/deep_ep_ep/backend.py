"""Owns the contract between `ElasticBuffer` and what moves its rows. Every backend gives the same results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from deep_ep_core.stream import CommScope
from deep_ep_ep.checks import CombineArgs, DispatchArgs
from deep_ep_ep.handle import EPHandle, Plan

__all__ = ["Backend", "CombineResult", "DispatchResult"]


@dataclass(slots=True, kw_only=True, eq=False)
class DispatchResult:
    """What a dispatch gives; the fields are described at `ElasticBuffer.dispatch`."""

    recv_x: torch.Tensor
    recv_sf: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    handle: EPHandle


@dataclass(slots=True, kw_only=True, eq=False)
class CombineResult:
    """What a combine gives; the fields are described at `ElasticBuffer.combine`."""

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None


class Backend(Protocol):
    """Moves rows between ranks. Arguments have passed the checks; each method is collective."""

    name: str
    may_stay: bool
    """Whether operations may run on the caller's stream, see `CommScope`."""

    def plan_type(self, x: torch.Tensor, topk_weights: torch.Tensor | None, num_experts: int) -> type[Plan]:
        """The plan that a dispatch of these arguments makes; reads no values, not collective."""

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""

    def empty_like_recv(self, handle: EPHandle, hidden: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Memory for the rows of a combine that spares a copy, or None where there is none; not collective."""

    def barrier(self, *, use_comm_stream: bool, with_cpu_sync: bool) -> None:
        """Let no rank go on until all have come; where the host does not wait, the streams do."""

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation, if there is a way to."""

    def close(self) -> None:
        """Release what the backend holds; not collective, may be called more than once."""
