"""Owns how low-latency dispatch casts rows to FP8: e4m3 with one scale for each 128 channels, rounded up if asked.

Rows carry float32 scales on their way; UE8M0 is what the receiver makes of rounded ones. Plain torch.
"""

from __future__ import annotations

import torch

__all__ = ["CHANNELS_PER_PACK", "CHANNELS_PER_SCALE", "cast_rows_to_fp8", "pack_ue8m0"]

CHANNELS_PER_SCALE = 128
CHANNELS_PER_PACK = 512
"""Channels of one int32 that holds four UE8M0 scales."""

_FP8_MAX = 448.0
# A group of zeros must not divide by zero.
_MIN_AMAX = 1e-4
_MANTISSA_BITS = 23
_MANTISSA_MASK = (1 << _MANTISSA_BITS) - 1


def cast_rows_to_fp8(x: torch.Tensor, *, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast rows to FP8.

    Args:
        x: `[num_rows, num_channels]` bfloat16, the channels a multiple of 128.
        round_scale: Round scales up to powers of two.

    Returns:
        `(payload, scales)`: float8_e4m3fn `[num_rows, num_channels]` and float32 `[num_rows, num_channels / 128]`; a
        value is payload times scale.
    """
    groups = x.float().unflatten(1, (-1, CHANNELS_PER_SCALE))
    amax = groups.abs().amax(-1).clamp_min(_MIN_AMAX)
    # A tensor: torch multiplies a CUDA tensor by the reciprocal of a Python number, which is not the same to the bit.
    fp8_max = torch.full((), _FP8_MAX, dtype=torch.float32, device=x.device)
    scales = amax / fp8_max
    multiplier = fp8_max / amax
    if round_scale:
        bits = scales.view(torch.int32)
        exponents = (bits >> _MANTISSA_BITS) + (bits & _MANTISSA_MASK != 0).int()
        scales = (exponents << _MANTISSA_BITS).view(torch.float32)
        multiplier = scales.reciprocal()
    payload = (groups * multiplier.unsqueeze(-1)).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return payload.view(x.shape), scales


def pack_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """Pack scales that are powers of two: byte b of pack p is the exponent of group 4p + b.

    Args:
        scales: float32 `[num_rows, num_scales]`, a multiple of 4 a row.

    Returns:
        int32 `[num_rows, num_scales / 4]`.
    """
    return (scales.view(torch.int32) >> _MANTISSA_BITS).to(torch.uint8).view(torch.int32)
