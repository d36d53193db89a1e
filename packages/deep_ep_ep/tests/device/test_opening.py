"""The values that an operation opens with, as the kernels compare them."""

from __future__ import annotations

import pytest
import torch

from deep_ep_core.transport import AgreedField
from deep_ep_ep.device.opening import Opening, OperationKind, agreed_fields, set_agreed


def opening_of(*values: int) -> list[int]:
    opening = Opening.__new__(Opening)
    # What an earlier operation left behind.
    opening.agreed[:] = [99] * len(opening.agreed)
    fields = [AgreedField(name=f"value {idx}", value=value) for idx, value in enumerate(values)]
    set_agreed(opening, agreed_fields(OperationKind.COMBINE, fields))
    return list(opening.agreed)


def test_values_stand_in_their_order_behind_the_operation() -> None:
    assert opening_of(5, 6, 7) == [OperationKind.COMBINE, 5, 6, 7, *[0] * 8]


def test_an_opening_has_a_place_for_the_device_behind_the_most_values() -> None:
    assert opening_of(*range(1, 11)) == [OperationKind.COMBINE, *range(1, 11), 0]
    with pytest.raises(AssertionError, match="no room for more values"):
        opening_of(*range(1, 12))


def test_values_that_differ_stay_different() -> None:
    """They travel in 32 bits: codes of dtypes use all of them, and a value may be negative."""
    assert opening_of(-1)[1] == 2**32 - 1
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.uint8, None]
    codes = [opening_of(AgreedField.of_dtype("x", dtype).value)[1] for dtype in dtypes]
    assert len(set(codes)) == len(dtypes)


def test_operations_that_must_not_meet_have_different_numbers() -> None:
    """A rank that only plans, for one, has no memory yet for the rows of those that plan and send."""
    assert len({int(kind) for kind in OperationKind}) == len(OperationKind) == 6
    assert 0 not in set(OperationKind)
