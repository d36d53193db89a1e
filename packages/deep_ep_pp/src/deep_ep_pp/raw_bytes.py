"""Owns the view of a tensor as its bytes, which is all that a message knows of it."""

from __future__ import annotations

import torch

__all__ = ["as_bytes"]


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as `[nbytes]` of uint8, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)
