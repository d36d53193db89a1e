"""Owns LogFMT-10: bfloat16 rows in ten bits a value, on a logarithmic scale of its own for each group of 128 channels.

It knows rows of numbers only; who sends them, and what for, is known elsewhere. Plain torch on the rows' own device.

A message holds, one after the other: the largest and the smallest magnitude of each group, as bfloat16 pairs
`[num_rows, num_groups, 2]`; the chunks that are encoded; the chunks that are not, as bfloat16. Chunks are of 1024
channels where these divide the row, else of 512, and lie in the order of rows and channels. A chunk is encoded if in
each of its groups all magnitudes are below 1 and not all equal; the receiver tells the same from the pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["CHANNEL_MULTIPLE", "MAX_LOG2_SPAN", "MAX_RELATIVE_ERROR", "decode_rows", "encode_rows"]

CHANNEL_MULTIPLE = 512
"""What the number of channels must be a multiple of."""

MAX_LOG2_SPAN = 32
"""Magnitudes below 2^-32 of their group's largest come back as 0, or as 2^-32 of it."""

MAX_RELATIVE_ERROR = 0.0225
"""Of all other values: half the widest step, (2^(32/510) - 1) / (2^(32/510) + 1), and a little for float32."""

_GROUP_CHANNELS = 128
_LARGE_CHUNK_CHANNELS = 1024
_NUM_STEPS = 510
_MAX_CODE = 511
_CODE_BITS = 9
# 16 values fill five words: 144 bits of codes, then 16 of signs.
_VALUES_PER_PACK = 16
_WORDS_PER_PACK = 5
_WORD_BITS = 32
_WORD_MASK = 0xFFFFFFFF
_SIGN_SHIFT = 16
_PAIR_BYTES = 4


class _Scale(NamedTuple):
    """The scale of groups, `[..., 1]` each: code c > 0 stands for 2^(low + (c - 1) * step)."""

    low: torch.Tensor
    step: torch.Tensor
    is_clipped: torch.Tensor


def encode_rows(rows: torch.Tensor) -> torch.Tensor:
    """Encode rows into one message.

    Args:
        rows: `[num_rows, num_channels]` bfloat16; the channels a multiple of 512.

    Returns:
        uint8 `[num_bytes]`, contiguous; 0.64 to 1.02 times the bytes of the rows.

    Collective: no. Waits for the device, since the size depends on the values.
    """
    num_rows, num_channels = rows.shape
    if num_rows == 0:
        return rows.new_empty(0, dtype=torch.uint8)
    chunk_channels = _chunk_channels(num_channels)
    magnitudes = rows.abs().view(num_rows, -1, _GROUP_CHANNELS)
    pairs = torch.stack([magnitudes.amax(-1), magnitudes.amin(-1)], dim=-1)
    is_encoded = _is_encoded(pairs, chunk_channels)
    chunks = rows.reshape(-1, chunk_channels)
    raw = chunks[~is_encoded]
    packed = _encode_chunks(chunks[is_encoded], _pairs_of_chunks(pairs, chunk_channels)[is_encoded])
    return torch.cat([_as_bytes(part) for part in (pairs, packed, raw)])


def decode_rows(message: torch.Tensor, num_rows: int, num_channels: int) -> torch.Tensor:
    """Decode a message of `encode_rows`.

    Args:
        message: uint8 `[num_bytes]`, contiguous, at a multiple of 4 bytes.
        num_rows: Rows that were encoded.
        num_channels: Their channels.

    Returns:
        float32 `[num_rows, num_channels]`: values of chunks that were not encoded are exact, others within
        `MAX_RELATIVE_ERROR` of their own magnitude, or within 2^-32 of their group's largest.

    Collective: no.
    """
    if num_rows == 0:
        return torch.empty(0, num_channels, dtype=torch.float32, device=message.device)
    chunk_channels = _chunk_channels(num_channels)
    num_pair_bytes = num_rows * num_channels // _GROUP_CHANNELS * _PAIR_BYTES
    pairs = message[:num_pair_bytes].view(torch.bfloat16).view(num_rows, -1, 2)
    is_encoded = _is_encoded(pairs, chunk_channels)
    num_encoded = int(is_encoded.sum())
    words_per_chunk = chunk_channels // _VALUES_PER_PACK * _WORDS_PER_PACK
    raw_start = num_pair_bytes + num_encoded * words_per_chunk * 4
    packed = message[num_pair_bytes:raw_start].view(torch.int32).view(num_encoded, words_per_chunk)
    chunks = torch.empty(len(is_encoded), chunk_channels, dtype=torch.float32, device=message.device)
    chunks[is_encoded] = _decode_chunks(packed, _pairs_of_chunks(pairs, chunk_channels)[is_encoded])
    chunks[~is_encoded] = message[raw_start:].view(torch.bfloat16).view(-1, chunk_channels).float()
    return chunks.view(num_rows, num_channels)


def _chunk_channels(num_channels: int) -> int:
    assert num_channels % CHANNEL_MULTIPLE == 0, num_channels
    return CHANNEL_MULTIPLE if num_channels % _LARGE_CHUNK_CHANNELS else _LARGE_CHUNK_CHANNELS


def _pairs_of_chunks(pairs: torch.Tensor, chunk_channels: int) -> torch.Tensor:
    return pairs.reshape(-1, chunk_channels // _GROUP_CHANNELS, 2)


def _is_encoded(pairs: torch.Tensor, chunk_channels: int) -> torch.Tensor:
    """Which chunks are encoded, bool `[num_chunks]`. Compares the values and no logarithms, so both sides agree."""
    high, low = _pairs_of_chunks(pairs, chunk_channels).unbind(-1)
    return ((high < 1) & (low < high)).all(-1)


def _scale_of(pairs: torch.Tensor) -> _Scale:
    high, low = pairs.float().log2().split(1, dim=-1)
    is_clipped = low < high - MAX_LOG2_SPAN
    low = torch.where(is_clipped, high - MAX_LOG2_SPAN, low)
    return _Scale(low, (high - low) / _NUM_STEPS, is_clipped)


def _encode_chunks(chunks: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Words int32 `[num_chunks, words_per_chunk]`."""
    values = chunks.float().unflatten(1, (-1, _GROUP_CHANNELS))
    magnitudes = values.abs()
    scale = _scale_of(pairs)
    # Rounds to the nearest of two neighbours, as seen on a linear scale: the border is their mean.
    border = torch.log2((1 + torch.exp2(scale.step)) / 2) / scale.step
    codes = ((magnitudes.log2() - scale.low) / scale.step + 2 - border).floor()
    # With a narrow scale, an error of log2 in the last bit must not make a 0 of the smallest magnitude.
    lowest_code = ((magnitudes > 0) & ~scale.is_clipped).float()
    codes = torch.maximum(codes, lowest_code).clamp_max(_MAX_CODE)
    packs = codes.long().flatten(1).unflatten(1, (-1, _VALUES_PER_PACK))
    signs = torch.signbit(values).long().view(packs.shape)
    words = packs.new_zeros(*packs.shape[:2], _WORDS_PER_PACK)
    for value_idx in range(_VALUES_PER_PACK):
        word_idx, shift = divmod(value_idx * _CODE_BITS, _WORD_BITS)
        code = packs[..., value_idx]
        words[..., word_idx] |= (code << shift) & _WORD_MASK
        if shift + _CODE_BITS > _WORD_BITS:
            words[..., word_idx + 1] |= code >> (_WORD_BITS - shift)
        words[..., -1] |= signs[..., value_idx] << (_SIGN_SHIFT + value_idx)
    packed: torch.Tensor = words.flatten(1).to(torch.int32)
    return packed


def _decode_chunks(packed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Values float32 `[num_chunks, chunk_channels]`."""
    words = packed.unflatten(1, (-1, _WORDS_PER_PACK)).long() & _WORD_MASK
    codes = words.new_empty(*words.shape[:2], _VALUES_PER_PACK)
    signs = torch.empty_like(codes)
    for value_idx in range(_VALUES_PER_PACK):
        word_idx, shift = divmod(value_idx * _CODE_BITS, _WORD_BITS)
        code = words[..., word_idx] >> shift
        if shift + _CODE_BITS > _WORD_BITS:
            code = code | (words[..., word_idx + 1] << (_WORD_BITS - shift))
        codes[..., value_idx] = code & _MAX_CODE
        signs[..., value_idx] = (words[..., -1] >> (_SIGN_SHIFT + value_idx)) & 1
    scale = _scale_of(pairs)
    groups = codes.flatten(1).unflatten(1, (-1, _GROUP_CHANNELS))
    magnitudes = torch.exp2(scale.low + (groups - 1) * scale.step)
    magnitudes = torch.where(groups == 0, 0.0, magnitudes)
    return torch.where(signs.view_as(groups) == 1, -magnitudes, magnitudes).flatten(1)


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(-1).view(torch.uint8)
