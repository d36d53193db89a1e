"""Owns the contract between `ElasticBuffer` and what moves its rows. Every backend gives the same results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from deep_ep_core.stream import CommScope
from deep_ep_ep.checks import CombineArgs, DispatchArgs
from deep_ep_ep.handle import EPHandle

__all__ = ["Backend", "CombineResult", "DispatchResult"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchResult:
    """What a dispatch gives; the fields are described at `ElasticBuffer.dispatch`."""

    recv_x: torch.Tensor
    recv_sf: torch.Tensor | None
    recv_topk_idx: torch.Tensor | None
    recv_topk_weights: torch.Tensor | None
    handle: EPHandle


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombineResult:
    """What a combine gives; the fields are described at `ElasticBuffer.combine`."""

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None


class Backend(Protocol):
    """Moves rows between ranks. Arguments have passed the checks; each method is collective."""

    name: str

    def dispatch(self, args: DispatchArgs, scope: CommScope) -> DispatchResult:
        """Send each token to the ranks of its experts, and lay out what arrives."""

    def combine(self, args: CombineArgs, scope: CommScope) -> CombineResult:
        """Bring rows back to the ranks of their tokens, and sum them."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation, if there is a way to."""

    def close(self) -> None:
        """Release what the backend holds; not collective, may be called more than once."""
