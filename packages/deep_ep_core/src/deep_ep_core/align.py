"""Owns integer rounding for sizes and offsets. It does not know what is being rounded, nor its unit."""

from __future__ import annotations

from deep_ep_core.errors import ConfigError

__all__ = ["align_up", "ceil_div"]


def ceil_div(value: int, divisor: int) -> int:
    """Divide two integers and round the quotient up, exactly at any size.

    Args:
        value: The dividend, at least 0.
        divisor: The divisor, at least 1.

    Returns:
        The smallest integer q with `q * divisor >= value`.

    Raises:
        ConfigError: A value out of range.
    """
    if value < 0:
        raise ConfigError(f"value must be at least 0 (got {value}); sizes and offsets are never negative")
    if divisor < 1:
        raise ConfigError(f"divisor must be at least 1 (got {divisor}); pass 1 to round to whole units")
    return -(-value // divisor)


def align_up(value: int, alignment: int) -> int:
    """Round an integer up to a multiple of another, which need not be a power of two.

    Args:
        value: The size or offset, at least 0.
        alignment: The step, at least 1, in the unit of `value`.

    Returns:
        The smallest multiple of `alignment` that is at least `value`.

    Raises:
        ConfigError: A value out of range.
    """
    return ceil_div(value, alignment) * alignment
