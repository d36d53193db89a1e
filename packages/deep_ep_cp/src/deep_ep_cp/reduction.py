"""Owns the sum of a reduce-scatter, to the bit: the order of the ranks, the dtype of the sum, one rounding.

`docs/internals/context.md` says the same in words. Every backend must give these bits.
"""

from __future__ import annotations

import torch

__all__ = ["SUM_DTYPES", "sum_in_rank_order"]

SUM_DTYPES = (
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
)
"""What a reduce-scatter takes."""

_PART_ELEMENTS = 4 << 20


def sum_in_rank_order(addends: torch.Tensor) -> torch.Tensor:
    """Add up what the ranks contribute.

    bfloat16, float16 and float32 are added in float32, everything else in its own dtype; integers wrap around. The sum
    starts at zero, takes rank 0, 1, 2, ... one after the other, and is rounded once, to the dtype of the addends.

    Args:
        addends: `[num_ranks, *shape]`, of one of `SUM_DTYPES`.

    Returns:
        `[*shape]` of the same dtype, in memory of its own.
    """
    rows = addends.reshape(addends.size(0), -1)
    result = torch.empty_like(rows[0])
    is_half = addends.dtype in (torch.bfloat16, torch.float16)
    # In parts that stay in a cache of the device from one rank's addend to the next.
    for total, *parts in zip(result.split(_PART_ELEMENTS), *(row.split(_PART_ELEMENTS) for row in rows), strict=True):
        acc = torch.zeros_like(total, dtype=torch.float32) if is_half else total.zero_()
        for part in parts:
            acc += part
        if is_half:
            total.copy_(acc)
    return result.view(addends.shape[1:])
