"""Owns the words with which a public call refuses an argument. What is refused is for the checks of each package."""

from __future__ import annotations

from deep_ep_core.errors import ConfigError

__all__ = ["rejected"]


def rejected(rank: int, must: str, got: object, remedy: str) -> ConfigError:
    """The error for an argument that cannot be taken, in the one form that all packages use.

    Args:
        rank: The rank that refuses it.
        must: What must hold, a sentence without its end.
        got: What came instead.
        remedy: What to do.

    Returns:
        The error, for the caller to raise. Collective: no.
    """
    return ConfigError(f"{must} (got {got}, on rank {rank}); {remedy}")
