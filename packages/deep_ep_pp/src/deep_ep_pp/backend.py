"""Owns the contract between `PipelineBuffer` and what moves its messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from deep_ep_pp.sizing import PipelineConfig

__all__ = ["Backend"]


class Backend(Protocol):
    """Moves messages between ranks. Arguments have passed the checks.

    Messages of one rank to another arrive in the order in which they were sent. At most `num_max_inflight_tensors` of
    them are on their way; the next `send` waits, on the host or in the stream, until the oldest was asked for.
    """

    name: str

    def configure(self, config: PipelineConfig) -> None:
        """Take a new configuration, where every message was received and all ranks bring the same; collective."""

    def send(self, tensors: Sequence[torch.Tensor], dst: int) -> None:
        """Send a message, which is read before the caller's stream goes on."""

    def recv(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """Receive the next message, which is there before the caller's stream goes on."""

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation, if there is a way to."""

    def flush(self) -> None:
        """Wait on the host until every message that was sent has been taken; not collective."""

    def close(self) -> None:
        """Release what the backend holds; not collective, may be called more than once."""
