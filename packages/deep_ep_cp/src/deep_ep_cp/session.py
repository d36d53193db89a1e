"""Owns the state machine of sessions: what is configured, whether a session is open, how much of it is used up.

All ranks go through the same states, since they make the same calls; nothing here communicates or touches memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.align import align_up
from deep_ep_core.refusals import rejected
from deep_ep_cp.region import REGION_ALIGNMENT_BYTES, Region

__all__ = ["MAX_CALLS_PER_SESSION", "Session", "SessionConfig"]

MAX_CALLS_PER_SESSION = 32
"""Most calls that a session can be configured for, as upstream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionConfig:
    """How large sessions are.

    Attributes:
        max_session_bytes: Bytes of all regions of a session, a multiple of `REGION_ALIGNMENT_BYTES`.
        max_calls: Calls of a session.
    """

    max_session_bytes: int
    max_calls: int

    @classmethod
    def checked(cls, max_session_bytes: object, max_calls: object, *, num_bytes: int, rank: int) -> SessionConfig:
        """The configuration that a user asks for.

        Raises:
            ConfigError: A number is out of range.
        """
        if not _is_int_in(max_session_bytes, 1, num_bytes):
            raise rejected(
                rank,
                f"num_max_session_bytes must be an integer in [1, num_bytes = {num_bytes}]",
                max_session_bytes,
                "make the buffer with get_agrs_buffer_size_hint(...) of it",
            )
        if not _is_int_in(max_calls, 1, MAX_CALLS_PER_SESSION):
            raise rejected(
                rank,
                f"num_max_all_gathers_per_session must be an integer in [1, {MAX_CALLS_PER_SESSION}]",
                max_calls,
                "batch several tensors into one call, or use several sessions",
            )
        assert isinstance(max_session_bytes, int)
        assert isinstance(max_calls, int)
        return cls(max_session_bytes=align_up(max_session_bytes, REGION_ALIGNMENT_BYTES), max_calls=max_calls)


class Session:
    """The sessions of one buffer on one rank, one after the other.

    Args:
        rank: This rank.
        num_ranks: Number of ranks.

    Attributes:
        config: How large sessions are; None before `configure`.
        idx: Number of the present session, or of the last one; the first is 1.
        is_open: Whether there is a present one.
        offset: Where its next region begins.
        num_calls: Calls made in it.
    """

    def __init__(self, *, rank: int, num_ranks: int) -> None:
        self._rank, self._num_ranks = rank, num_ranks
        self.config: SessionConfig | None = None
        self.idx = 0
        self.is_open = False
        self.offset = 0
        self.num_calls = 0

    def check_configurable(self) -> None:
        """Raise if a session is open.

        Raises:
            ConfigError: It is.
        """
        if self.is_open:
            raise rejected(
                self._rank,
                "agrs_set_config must be called outside of a session",
                f"session {self.idx}, which is open",
                "destroy the session first",
            )

    def create(self) -> None:
        """Open the next session, with nothing used.

        Raises:
            ConfigError: Nothing is configured, or a session is open.
        """
        if self.config is None:
            raise rejected(
                self._rank,
                "agrs_set_config must be called before the first session",
                "no configuration",
                "call it once, on every rank",
            )
        if self.is_open:
            raise rejected(
                self._rank,
                "a session must be destroyed before the next one is created",
                f"session {self.idx}, which is open",
                "call destroy_agrs_session, or use agrs_new_session",
            )
        self.is_open = True
        self.offset = self.num_calls = 0
        self.idx += 1

    def destroy(self) -> None:
        """Close the session.

        Raises:
            ConfigError: None is open.
        """
        self._check_open("destroy_agrs_session")
        self.is_open = False

    def place(self, call: str, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]) -> list[Region]:
        """The regions that a call would get now. Uses nothing up.

        Args:
            call: Name of the call.
            shapes: Shape of a slot, for each tensor.
            dtypes: Its dtype, likewise.

        Raises:
            ConfigError: No session is open, or there is no room for them.
        """
        config = self._check_open(call)
        if self.num_calls >= config.max_calls:
            raise rejected(
                self._rank,
                f"a session must have at most num_max_all_gathers_per_session = {config.max_calls} calls",
                f"one more, {call}",
                "batch several tensors into one call, or begin a new session",
            )
        regions: list[Region] = []
        offset = self.offset
        for shape, dtype in zip(shapes, dtypes, strict=True):
            regions.append(Region(offset=offset, num_ranks=self._num_ranks, shape=shape, dtype=dtype))
            offset = regions[-1].aligned_end
        if offset > config.max_session_bytes:
            raise rejected(
                self._rank,
                f"a session must hold at most num_max_session_bytes = {config.max_session_bytes} bytes",
                f"{self.offset} bytes in use and {offset - self.offset} more for {call}",
                "configure more, see get_agrs_num_max_session_bytes, or begin a new session",
            )
        return regions

    def use(self, regions: Sequence[Region]) -> None:
        """Count a call that was made, and the regions that it was given."""
        self.offset = regions[-1].aligned_end
        self.num_calls += 1

    def _check_open(self, call: str) -> SessionConfig:
        if not self.is_open or self.config is None:
            raise rejected(
                self._rank, f"{call} must be called in a session", "none that is open", "call create_agrs_session first"
            )
        return self.config

    def __repr__(self) -> str:
        if self.config is None:
            return "not configured"
        if not self.is_open:
            return f"{self.idx} sessions so far, none open"
        used, most = f"{self.offset} of {self.config.max_session_bytes} bytes", self.config.max_calls
        return f"session {self.idx}: {self.num_calls} of {most} calls, {used}"


def _is_int_in(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
