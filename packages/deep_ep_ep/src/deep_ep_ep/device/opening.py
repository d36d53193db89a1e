"""Owns what ranks tell each other when an operation opens: the mirror of `opening.cuh`.

The kernels compare the agreed values and leave the place of the first that differs in the record; `device.failures`
turns it into words.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from deep_ep_core.jit.structs import ParamsStruct, UInt32, UInt64
from deep_ep_core.lsa_team import MAX_LSA_RANKS
from deep_ep_core.transport import AgreedField

__all__ = [
    "BY_EXPERT",
    "OPENING_SLOTS_BYTES",
    "PUSHED",
    "AgreedValues",
    "Opening",
    "OperationKind",
    "agreed_fields",
    "set_agreed",
]

_NUM_AGREED = 12
_NUM_TOLD = 2
_MESSAGE_BYTES = 16

OPENING_SLOTS_BYTES = 2 * MAX_LSA_RANKS * (_NUM_AGREED // 2 + _NUM_TOLD) * _MESSAGE_BYTES
"""Bytes of the window for the openings of all ranks: `OpeningSlots`."""

BY_EXPERT = 1
"""Lowest bit of a dispatch's `told[1]`: x is expected by expert."""

PUSHED = 2**64 - 1
"""A combine's `told[0]` of a rank that pushes its rows."""


class OperationKind(enum.IntEnum):
    """What an opening opens."""

    DISPATCH = 1
    PLACE = 2
    COMBINE = 3
    # Not the same as DISPATCH: a rank that only plans has no memory for rows yet, and peers must not send any.
    PLAN = 4
    # Across nodes only: in one node a barrier opens nothing.
    BARRIER = 5
    # Across nodes only: this rank cannot take part in what the others open, and lets them know.
    REFUSAL = 6


class Opening(ParamsStruct):
    """What a rank opens an operation with; mirror of the struct in `opening.cuh`.

    The first agreed value is the operation, the last is filled in by the device.
    """

    __slots__ = ()
    cuda_name = "deep_ep_ep::Opening"
    _fields_ = (("agreed", UInt32 * _NUM_AGREED), ("told", UInt64 * _NUM_TOLD))


class AgreedValues:
    """The agreed values of the openings of one kind of calls, written into their parameters.

    Args:
        opening: Where to.
        fields: What the ranks must agree on, without the operation.
        handle_name: Name of the field whose value may change from call to call.
    """

    __slots__ = ("_by_operation", "_handle_idx", "_words")

    def __init__(self, opening: Opening, fields: Sequence[AgreedField], *, handle_name: str) -> None:
        self._by_operation = {kind: agreed_fields(kind, fields) for kind in OperationKind}
        self._handle_idx = 1 + [field.name for field in fields].index(handle_name)
        set_agreed(opening, self._by_operation[OperationKind.DISPATCH])
        self._words = opening.agreed

    def begin(self, kind: OperationKind, dispatch_idx: int) -> tuple[AgreedField, ...]:
        """Write the values of one opening.

        Args:
            kind: What it opens.
            dispatch_idx: Number of the dispatch that made the handle; 0 without one.

        Returns:
            The fields in the places of their values, to name one that differs. That of the handle may have another
            value than what was written.
        """
        words = self._words
        words[0], words[self._handle_idx] = kind, dispatch_idx
        return self._by_operation[kind]


def agreed_fields(kind: OperationKind, fields: Sequence[AgreedField]) -> tuple[AgreedField, ...]:
    """The values of an opening, in their places."""
    assert len(fields) <= _NUM_AGREED - 2, "an opening has no room for more values"
    return _KIND_FIELDS[kind], *fields


def set_agreed(opening: Opening, fields: Sequence[AgreedField]) -> None:
    """Write the values into an opening; places without one are 0."""
    opening.agreed[:] = [field.value & 0xFFFFFFFF for field in fields] + [0] * (_NUM_AGREED - len(fields))


def _show_kind(value: int) -> str:
    # Where the rest differs too, as with a handle on some ranks only, that is named instead.
    return next((name for kind, name in _KIND_NAMES.items() if kind == value), f"operation {value}")


_KIND_NAMES = {
    OperationKind.DISPATCH: "dispatch",
    OperationKind.PLACE: "dispatch of known counts",
    OperationKind.COMBINE: "combine",
    OperationKind.PLAN: "dispatch with CPU sync",
    OperationKind.BARRIER: "barrier",
    OperationKind.REFUSAL: "refusal",
}
_KIND_FIELDS = {kind: AgreedField(name="operation", value=kind, show=_show_kind) for kind in OperationKind}
