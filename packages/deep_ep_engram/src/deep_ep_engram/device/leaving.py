"""Owns what this rank has closed and others may still read over the network: it goes once every rank has closed.

Ranks close on their own, without meeting, so each leaves word in the group's store. Nobody waits: who comes last lets
his own part go at once, others when they next open a table, or with the communicator.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence

from deep_ep_core.backend_choice import OPEN_DEVICE, Closable
from deep_ep_core.nccl import Communicator
from deep_ep_core.transport import CollectiveTransport

__all__ = ["SharedLife", "let_go_of_the_left"]

_ID_BYTES = 7
_left: weakref.WeakKeyDictionary[Communicator, list[SharedLife]] = weakref.WeakKeyDictionary()


class SharedLife:
    """The life of what all ranks hold a part of.

    Args:
        transport: The group's transport, with an operation `OPEN_DEVICE`.
        communicator: Where the parts are registered.

    Collective: the constructor is; `leave` is not.
    """

    def __init__(self, transport: CollectiveTransport, communicator: Communicator) -> None:
        own_id = int.from_bytes(secrets.token_bytes(_ID_BYTES), "little")
        told = transport.begin(OPEN_DEVICE, [], [[own_id]] * transport.num_ranks)
        # That of rank 0, so that all ranks have one.
        self._key = f"deep_ep_engram/left/{told.peer_values[0][0]:x}"
        self._group = transport.group
        self._num_ranks = transport.num_ranks
        self._communicator = weakref.ref(communicator)
        self._parts: Sequence[Closable] = ()

    def leave(self, parts: Sequence[Closable]) -> None:
        """Close the parts of this rank as soon as no other rank needs them. Never waits, never raises.

        Args:
            parts: In the order in which they are closed.
        """
        self._parts = parts
        communicator = self._communicator()
        if not self._is_over(1) and communicator is not None:
            _left.setdefault(communicator, []).append(self)
            return
        self._close_parts()

    def close_if_over(self) -> bool:
        """Close the parts if all ranks have left; whether they have."""
        is_over = self._is_over(0)
        if is_over:
            self._close_parts()
        return is_over

    def _is_over(self, num_more: int) -> bool:
        try:
            # A count of the store is read by adding to it.
            num_left: int = self._group.get_group_store().add(self._key, num_more)
        except (AttributeError, RuntimeError):
            # A group without a store, or whose store has gone: then the communicator goes too.
            return False
        return num_left >= self._num_ranks

    def _close_parts(self) -> None:
        parts, self._parts = self._parts, ()
        for part in parts:
            part.close()


def let_go_of_the_left(communicator: Communicator) -> None:
    """Close what this rank has left, where all others have by now. Collective: no."""
    waiting = _left.pop(communicator, [])
    still = [life for life in waiting if not life.close_if_over()]
    if still:
        _left[communicator] = still
