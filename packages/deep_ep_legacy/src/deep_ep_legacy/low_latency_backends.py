"""Owns what a backend of low-latency calls is, and the collective one. The device backend is `device.low_latency`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch

from deep_ep_core.transport import CollectiveTransport
from deep_ep_legacy.low_latency_checks import agreed_sizes
from deep_ep_legacy.low_latency_combine import CombineArgs, CombineUnderWay
from deep_ep_legacy.low_latency_dispatch import DispatchArgs, DispatchResults, DispatchUnderWay
from deep_ep_legacy.low_latency_peers import Peers

__all__ = ["CollectiveLatency", "CombineCall", "DispatchCall", "LatencyBackend"]


class _Call(Protocol):
    @property
    def outputs(self) -> list[torch.Tensor | None]:
        """Every tensor that the caller is given."""

    def complete(self) -> None:
        """Receive: on a host that waits, or as a kernel of the current stream. Called once."""


class DispatchCall(_Call, Protocol):
    """A dispatch that has sent its rows."""

    results: DispatchResults


class CombineCall(_Call, Protocol):
    """A combine that has sent its rows."""

    combined_x: torch.Tensor


class LatencyBackend(Protocol):
    """What `LowLatencySession` needs of a backend. Arguments have been checked, as far as all backends take them.

    Attributes:
        device: The only device of its tensors; None for any.
        reads_indices: Whether calls may look at the values of `topk_idx`, which waits for their device.
        max_under_way: The most calls that may have sent and not received; None for any number. Calls that are not split
            count too.
        has_mask: Whether ranks can be masked.
    """

    device: torch.device | None
    reads_indices: bool
    max_under_way: int | None
    has_mask: bool

    def dispatch(self, args: DispatchArgs, *, is_split: bool) -> DispatchCall:
        """Send. Where the call is not split, `complete` follows at once."""

    def combine(self, args: CombineArgs, *, is_split: bool) -> CombineCall:
        """Send, as `dispatch`."""

    def meet(self, num_max_tokens: int, hidden: int, num_experts: int) -> None:
        """Meet all ranks, which must pass the same."""

    def rejections_reported(self, name: str) -> AbstractContextManager[None]:
        """While arguments are checked: peers may be told why this rank does not come."""

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """Mask another rank, or take it back."""

    def copy_mask(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, else 0."""

    def clean_mask(self) -> None:
        """Take all ranks back."""

    @property
    def has_failed(self) -> bool:
        """Whether rows may be missing for good."""


class CollectiveLatency:
    """Low-latency calls by messages of the group.

    Args:
        transport: The group's transport.
        enable_shrink: Keep a mask of ranks that take no part.
    """

    device: torch.device | None = None
    reads_indices = True
    max_under_way: int | None = None

    def __init__(self, transport: CollectiveTransport, *, enable_shrink: bool) -> None:
        self._peers = Peers(transport, enable_shrink=enable_shrink)
        self.has_mask = enable_shrink

    def dispatch(self, args: DispatchArgs, *, is_split: bool) -> DispatchCall:
        """Agree, and post the rows."""
        return DispatchUnderWay(self._peers, args)

    def combine(self, args: CombineArgs, *, is_split: bool) -> CombineCall:
        """Agree, and post the rows."""
        return CombineUnderWay(self._peers, args)

    def meet(self, num_max_tokens: int, hidden: int, num_experts: int) -> None:
        """The host waits until all ranks have come."""
        self._peers.open("clean_low_latency_buffer", agreed_sizes(num_max_tokens, hidden, num_experts))

    def rejections_reported(self, name: str) -> AbstractContextManager[None]:
        """Peers learn of a refusal when they wait for this rank."""
        return self._peers.rejections_reported(name)

    def set_masked(self, rank: int, is_masked: bool) -> None:
        """Mask another rank, or take it back."""
        self._mask()[rank] = is_masked

    def copy_mask(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, else 0."""
        mask_status.copy_(torch.tensor(self._mask()))

    def clean_mask(self) -> None:
        """Take all ranks back."""
        mask = self._mask()
        mask[:] = [False] * len(mask)

    @property
    def has_failed(self) -> bool:
        """Whether messages may be missing for good."""
        return self._peers.has_failed

    def _mask(self) -> list[bool]:
        assert self._peers.mask is not None, "the session has looked at has_mask"
        return self._peers.mask
