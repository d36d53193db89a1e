"""Owns `SessionHandle`: what a call in a session returns, to be called before its results are used."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deep_ep_core.refusals import rejected
from deep_ep_core.stream import EventOverlap
from deep_ep_cp.session import Session

__all__ = ["SessionHandle"]


class SessionHandle:
    """Call it to make the current stream wait for the results of one all-gather or reduce-scatter.

    It may be called more than once, and in any order with other handles, while the session is open and from the stream
    on which the results were asked for. It keeps the inputs alive where torch does not (`EP_AVOID_RECORD_STREAM`), so
    keep it until it was called.

    Attributes:
        event: The point in the communication stream at which the results are ready.
    """

    __slots__ = ("_check", "_device", "_rank", "_session", "_session_idx", "_stream", "event")

    def __init__(
        self, event: EventOverlap, session: Session, device: torch.device, *, rank: int, check: Callable[[], None]
    ) -> None:
        self.event = event
        self._check = check
        self._session, self._session_idx = session, session.idx
        self._device, self._rank = device, rank
        self._stream = _current_stream(device)

    def __call__(self) -> None:
        """Make the current stream wait for the results; does not block the host.

        Raises:
            ConfigError: The session of the call is over, or another stream is current.
            CommTimeoutError, RankMismatchError: Known by now of this call or one before it, on the device backend.

        Collective: no.
        """
        self._check()
        if not self._session.is_open or self._session.idx != self._session_idx:
            raise rejected(
                self._rank,
                f"the handle of session {self._session_idx} must be called while that session is open",
                self._session,
                "call it before destroy_agrs_session, and copy what you need for longer",
            )
        if (stream := _current_stream(self._device)) != self._stream:
            raise rejected(
                self._rank,
                f"a handle must be called on the stream of its call, {self._stream}",
                stream,
                "call it there, and let the other stream wait for that one",
            )
        self.event.current_stream_wait()

    def __repr__(self) -> str:
        return f"SessionHandle(session {self._session_idx}, {self.event!r})"


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream; None on a CPU, where there is nothing to wait for."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
