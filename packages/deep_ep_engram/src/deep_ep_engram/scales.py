"""Owns how the scales of fetched entries are laid out. They never travel: every rank has those of all entries."""

from __future__ import annotations

import torch

from deep_ep_core.align import align_up

__all__ = ["empty_scales", "gather_scales"]

# Column-major scales begin each column at 16 bytes, which is what TMA descriptors can read.
_PACKS_PER_16_BYTES = 4


def gather_scales(sf: torch.Tensor, indices: torch.Tensor, *, is_col_major: bool) -> torch.Tensor:
    """The scales of entries, those of a token side by side.

    Args:
        sf: `[num_entries, num_packs]` of 4-byte elements, contiguous.
        indices: `[num_tokens, num_entries_per_token]` of rows of `sf`.
        is_col_major: Lay the result out column by column.

    Returns:
        `[num_tokens, num_entries_per_token * num_packs]` of the scales' dtype. Row-major it is contiguous. Column-major
        its strides are `(1, ceil4(num_tokens))`, where ceil4 rounds up to a multiple of four; the padding after every
        column, the last included, is zero.
    """
    num_tokens, num_each = indices.shape
    # As int32, since torch cannot index every dtype of four bytes.
    rows = sf.view(torch.int32).index_select(0, indices.reshape(-1)).view(num_tokens, num_each * sf.size(1))
    if is_col_major:
        columns = empty_scales(sf, num_tokens, num_each, is_col_major=True)
        columns.view(torch.int32).copy_(rows)
        return columns
    return rows.view(sf.dtype)


def empty_scales(sf: torch.Tensor, num_tokens: int, num_each: int, *, is_col_major: bool) -> torch.Tensor:
    """A tensor for what `gather_scales` returns: its values undefined, but for padding, which is zero.

    Args:
        sf: `[num_entries, num_packs]` of 4-byte elements.
        num_tokens: Tokens.
        num_each: Entries of a token.
        is_col_major: Lay it out column by column.
    """
    num_columns = num_each * sf.size(1)
    if not is_col_major:
        return sf.new_empty(num_tokens, num_columns)
    column_packs = align_up(num_tokens, _PACKS_PER_16_BYTES)
    # As int32: not every dtype of four bytes can be filled.
    make = torch.empty if column_packs == num_tokens else torch.zeros
    flat = make(num_columns * column_packs, dtype=torch.int32, device=sf.device)
    return flat.as_strided((num_tokens, num_columns), (1, column_packs)).view(sf.dtype)
