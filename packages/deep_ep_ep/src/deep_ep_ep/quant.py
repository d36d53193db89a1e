"""Owns the cast of token rows to FP8 with one scale per group of channels, and the two layouts those scales travel in.

A scale is float32, or UE8M0: the exponent byte of a power of two (OCP MX format, E8M0), four bytes to an int32.
Everything here is plain torch on the tensors' own device. It moves nothing between ranks: dispatch carries payload and
scales as opaque bytes. Results carry no autograd graph.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.errors import ConfigError

__all__ = [
    "ScaleFormat",
    "cast_from_fp8",
    "cast_to_fp8",
    "new_tma_aligned_col_major",
    "pack_ue8m0",
    "to_tma_aligned_col_major",
    "unpack_ue8m0",
]

ScaleFormat: TypeAlias = Literal["float32", "ue8m0"]

# Largest finite value of float8_e4m3fn.
_FP8_MAX = 448.0
# A group of zeros must not divide by zero; 1e-4 is what DeepEP has always used, and what its consumers expect.
_MIN_AMAX = 1e-4

_UE8M0_PER_PACK = 4
# float32 bits: sign 1, exponent 8, mantissa 23. A UE8M0 byte is the exponent field, so 2^-127 (which as a float32 is
# subnormal: exponent field 0, top mantissa bit set) is byte 0, and byte 255 is the format's NaN.
_MANTISSA_BITS = 23
_MANTISSA_MASK = (1 << _MANTISSA_BITS) - 1
_EXPONENT_NAN = 255
_BITS_OF_2_POW_MINUS_127 = 1 << (_MANTISSA_BITS - 1)

# One TMA row must start at a multiple of 16 bytes: four 4-byte packs.
_PACKS_PER_16_BYTES = 4


def cast_to_fp8(
    x: Tensor,
    *,
    group_size: int = 128,
    scale_format: ScaleFormat = "float32",
    round_scales: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise each token to FP8 (e4m3fn), with one scale per group of channels.

    Per group, `amax = max(1e-4, max(abs(x)))` and `scale = amax / 448`. The payload is `x * (448 / amax)` in float32,
    rounded to nearest even; it never exceeds 448. A rounded scale is the smallest power of two that is at least
    `amax / 448`, and the payload is then `x` divided by exactly that power. CPU and CUDA give the same bits. The last
    group is short where `hidden` is not a multiple of `group_size`. A group that holds inf or NaN comes back from
    `cast_from_fp8` as NaN throughout.

    Never waits for the device, so it may be captured in a CUDA graph. Collective: no.

    Args:
        x: `[num_tokens, hidden]`, bfloat16, float16 or float32, any strides; `num_tokens` may be 0.
        group_size: Channels that share a scale.
        scale_format: `"float32"`, or `"ue8m0"` for packed exponent bytes.
        round_scales: Round scales up to powers of two. None: only where the format needs it, for `"ue8m0"`.

    Returns:
        `(payload, scales)`. The payload is float8_e4m3fn `[num_tokens, hidden]`. Scales are float32
        `[num_tokens, num_groups]` with `num_groups = ceil(hidden / group_size)`, or for `"ue8m0"` int32
        `[num_tokens, ceil(num_groups / 4)]` as `pack_ue8m0` lays them out. Both are contiguous.

    Raises:
        ConfigError: A shape, dtype or option is not one of the above.
    """
    if x.dim() != 2 or x.shape[1] < 1:
        raise ConfigError(f"x must be [num_tokens, hidden] with hidden at least 1 (got {list(x.shape)}); reshape it")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ConfigError(f"x must be bfloat16, float16 or float32 (got {x.dtype}); cast it first")
    _check_group_size(group_size)
    if scale_format not in ("float32", "ue8m0"):
        raise ConfigError(f"scale_format must be 'float32' or 'ue8m0' (got {scale_format!r})")
    if round_scales is None:
        round_scales = scale_format == "ue8m0"
    elif scale_format == "ue8m0" and not round_scales:
        raise ConfigError("round_scales must be True or None with scale_format='ue8m0': it can only hold powers of two")

    groups = _split_into_groups(x.detach().float(), group_size)
    amax = groups.abs().amax(dim=-1).clamp_min(_MIN_AMAX)
    # A tensor, not a Python number: torch turns division of a CUDA tensor by a number into a multiplication by its
    # reciprocal, which is one bit off now and then, and would make the two devices disagree.
    fp8_max = torch.full((), _FP8_MAX, dtype=torch.float32, device=x.device)
    if round_scales:
        exponents = _ceil_to_exponent(amax / fp8_max)
        scales = _exponent_to_float(exponents)
        multiplier = scales.reciprocal()
    else:
        scales = amax / fp8_max
        multiplier = fp8_max / amax
    # No clamp: float32 rounding puts a value over 448 by 2^-22 of itself at most, and up to 464 the cast gives 448.
    values = groups * multiplier.unsqueeze(-1)
    payload = values.flatten(1)[:, : x.shape[1]].to(torch.float8_e4m3fn).contiguous()
    return payload, (_pack_exponents(exponents) if scale_format == "ue8m0" else scales)


def cast_from_fp8(
    payload: Tensor, scales: Tensor, *, group_size: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Multiply an FP8 payload by its scales: the way back from `cast_to_fp8`.

    The product is computed in float32 and rounded once to `dtype`. Never waits for the device. Collective: no.

    Args:
        payload: float8_e4m3fn `[num_tokens, hidden]`, any strides.
        scales: float32 `[num_tokens, num_groups]` or packed int32 `[num_tokens, ceil(num_groups / 4)]`, where
            `num_groups = ceil(hidden / group_size)`; any strides, so row-major or column-major. The dtype tells the
            format.
        group_size: Channels that share a scale, as given to `cast_to_fp8`.
        dtype: Floating-point type of the result.

    Returns:
        `[num_tokens, hidden]` of `dtype`, contiguous.

    Raises:
        ConfigError: Shapes, dtypes or devices do not fit together.
    """
    if payload.dim() != 2 or payload.shape[1] < 1 or payload.dtype != torch.float8_e4m3fn:
        raise ConfigError(
            "payload must be [num_tokens, hidden] float8_e4m3fn with hidden at least 1 "
            f"(got {list(payload.shape)} {payload.dtype})"
        )
    _check_group_size(group_size)
    if scales.dtype not in (torch.float32, torch.int32):
        raise ConfigError(f"scales must be float32, or int32 holding packed UE8M0 (got {scales.dtype})")
    if scales.device != payload.device:
        raise ConfigError(f"scales must be on the payload's device, {payload.device} (got {scales.device}); move them")
    if not dtype.is_floating_point:
        raise ConfigError(f"dtype must be a floating-point type (got {dtype})")
    num_tokens, hidden = payload.shape
    num_groups = ceil_div(hidden, group_size)
    is_packed = scales.dtype == torch.int32
    expected_shape = (num_tokens, ceil_div(num_groups, _UE8M0_PER_PACK) if is_packed else num_groups)
    if scales.shape != expected_shape:
        raise ConfigError(
            f"{scales.dtype} scales must be {list(expected_shape)} for a payload {list(payload.shape)} with "
            f"group_size={group_size} (got {list(scales.shape)}); pass the group_size they were made with"
        )

    factors = unpack_ue8m0(scales, num_groups) if is_packed else scales.detach()
    values = _split_into_groups(payload.detach().float(), group_size) * factors.unsqueeze(-1)
    return values.flatten(1)[:, :hidden].to(dtype).contiguous()


def pack_ue8m0(scales: Tensor) -> Tensor:
    """Pack float32 scales that are powers of two into UE8M0, four exponent bytes to an int32.

    The byte of group `4 * i + j` is byte `j`, counted from the least significant, of pack `i`. Unused bytes are 0.
    Exact. On CUDA it waits for the device, because it looks at the values: `cast_to_fp8(..., scale_format="ue8m0")`
    makes packed scales without waiting. Collective: no.

    Args:
        scales: float32 `[..., num_groups]`, any strides; powers of two from 2^-127 to 2^127.

    Returns:
        int32 `[..., ceil(num_groups / 4)]`, contiguous.

    Raises:
        ConfigError: Wrong shape or dtype, or a scale that is zero, negative, not finite or not a power of two.
    """
    if scales.dim() < 1 or scales.shape[-1] < 1 or scales.dtype != torch.float32:
        raise ConfigError(
            "scales must be [..., num_groups] float32 with num_groups at least 1 "
            f"(got {list(scales.shape)} {scales.dtype})"
        )
    bits = scales.detach().view(torch.int32)
    exponents = bits >> _MANTISSA_BITS  # Arithmetic: a negative scale gives a negative number.
    is_normal_power = (bits & _MANTISSA_MASK == 0) & (exponents > 0) & (exponents < _EXPONENT_NAN)
    is_bad = ~(is_normal_power | (bits == _BITS_OF_2_POW_MINUS_127))
    if bool(is_bad.any()):
        first_bad = is_bad.nonzero()[0].tolist()
        raise ConfigError(
            f"scales must be powers of two from 2^-127 to 2^127 (got {scales[tuple(first_bad)].item()} at {first_bad}, "
            f"{int(is_bad.sum())} such in all); round them up first, as cast_to_fp8 does with round_scales=True"
        )
    return _pack_exponents(exponents)


def unpack_ue8m0(packed: Tensor, num_groups: int) -> Tensor:
    """Turn packed UE8M0 scales back into float32 powers of two: the inverse of `pack_ue8m0`.

    Byte 255 is NaN, as the format says. Never waits for the device. Collective: no.

    Args:
        packed: int32 `[..., ceil(num_groups / 4)]`, any strides.
        num_groups: How many scales the last axis holds; bytes after them are ignored.

    Returns:
        float32 `[..., num_groups]`.

    Raises:
        ConfigError: Wrong shape or dtype, or `num_groups` does not fit the last axis.
    """
    if packed.dim() < 1 or packed.dtype != torch.int32:
        raise ConfigError(f"packed must be [..., num_packs] int32 (got {list(packed.shape)} {packed.dtype})")
    if num_groups < 1 or ceil_div(num_groups, _UE8M0_PER_PACK) != packed.shape[-1]:
        raise ConfigError(
            f"num_groups must fill {packed.shape[-1]} packs of {_UE8M0_PER_PACK}, the last at least in part "
            f"(got {num_groups}); pass the number of scales per token, not of packs"
        )
    # Byte order of the view is the machine's; every platform torch ships for is little-endian, as the layout is.
    exponents = packed.detach().contiguous().view(torch.uint8)[..., :num_groups]
    return _exponent_to_float(exponents.to(torch.int32))


def to_tma_aligned_col_major(scales: Tensor) -> Tensor:
    """Copy scales into the column-major layout that TMA descriptors can read: each column starts at 16 bytes.

    Args:
        scales: `[num_tokens, num_packs]`, float32 or packed int32, any strides.

    Returns:
        A new tensor, same shape, dtype and device, with strides `(1, ceil4(num_tokens))`, where ceil4 rounds up to a
        multiple of four 4-byte packs. Its storage holds the padding after every column, the last included, and it is
        zero.

    Raises:
        ConfigError: Wrong shape or dtype.
    """
    if scales.dim() != 2 or scales.dtype not in (torch.float32, torch.int32):
        raise ConfigError(
            f"scales must be [num_tokens, num_packs] float32 or int32 (got {list(scales.shape)} {scales.dtype})"
        )
    return new_tma_aligned_col_major(scales, scales.size(0)).copy_(scales.detach())


def new_tma_aligned_col_major(like: Tensor, num_tokens: int) -> Tensor:
    """A tensor of zeros in the layout of `to_tma_aligned_col_major`, to be filled.

    Args:
        like: `[any, num_packs]` of 4-byte elements: gives `num_packs`, dtype and device.
        num_tokens: Rows of the new tensor.

    Returns:
        `[num_tokens, num_packs]` with strides `(1, ceil4(num_tokens))`; its storage holds the padding after every
        column, the last included.
    """
    num_packs = like.size(1)
    column_packs = align_up(num_tokens, _PACKS_PER_16_BYTES)
    storage = like.new_zeros(num_packs * column_packs)
    # Not `.t()[:num_tokens]`: torch would choose other strides where a dimension is 0 or 1.
    return storage.as_strided((num_tokens, num_packs), (1, column_packs))


def _check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise ConfigError(f"group_size must be at least 1 channel (got {group_size}); 128 is usual")


def _split_into_groups(values: Tensor, group_size: int) -> Tensor:
    """View `[num_tokens, hidden]` as `[num_tokens, num_groups, group_size]`, zeros after the last channel."""
    num_tokens, hidden = values.shape
    num_groups = ceil_div(hidden, group_size)
    if hidden % group_size:
        values = torch.nn.functional.pad(values, (0, num_groups * group_size - hidden))
    return values.reshape(num_tokens, num_groups, group_size)


def _ceil_to_exponent(values: Tensor) -> Tensor:
    """Exponent field, as int32, of the smallest power of two that is at least each positive normal value.

    Works on the bits, so that a value that is a power of two stays itself; inf and NaN give the format's NaN.
    """
    bits = values.view(torch.int32) & 0x7FFFFFFF  # A NaN may carry a sign.
    round_up = (bits & _MANTISSA_MASK != 0).to(torch.int32)
    return ((bits >> _MANTISSA_BITS) + round_up).clamp_max(_EXPONENT_NAN)


def _exponent_to_float(exponents: Tensor) -> Tensor:
    """The float32 that each UE8M0 byte, given as int32, stands for."""
    bits = exponents << _MANTISSA_BITS
    bits = torch.where(exponents == 0, _BITS_OF_2_POW_MINUS_127, bits)
    # The field 255 with an empty mantissa would be inf; one mantissa bit makes it a quiet NaN.
    bits = torch.where(exponents == _EXPONENT_NAN, bits | _BITS_OF_2_POW_MINUS_127, bits)
    return bits.view(torch.float32)


def _pack_exponents(exponents: Tensor) -> Tensor:
    """Pack UE8M0 bytes, given as int32 `[..., num_groups]`, four to an int32."""
    num_groups = exponents.shape[-1]
    num_padded = align_up(num_groups, _UE8M0_PER_PACK)
    padded = torch.nn.functional.pad(exponents.to(torch.uint8), (0, num_padded - num_groups))
    return padded.contiguous().view(torch.int32)
