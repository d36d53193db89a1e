"""Owns what the ranks of a `ContextBuffer` must agree on: the operations, and the values of each."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from deep_ep_core.backend_choice import OPEN_DEVICE
from deep_ep_core.transport import AgreedField
from deep_ep_cp.region import Region
from deep_ep_cp.session import SessionConfig

__all__ = ["END_SESSION", "OPERATIONS", "SET_CONFIG", "agreed_by_call", "agreed_by_config", "digest_of_call"]

SET_CONFIG = "agrs_set_config"
END_SESSION = "destroy_agrs_session"
OPERATIONS = ("open", OPEN_DEVICE, SET_CONFIG, "all_gather", "reduce_scatter", END_SESSION)

# Tensors of a batch that are compared one by one; all of them are compared as a whole.
_NUM_SHOWN_TENSORS = 6


def agreed_by_config(config: SessionConfig) -> list[AgreedField]:
    """The values of a configuration, which every rank must pass alike."""
    return [
        AgreedField(name="num_max_session_bytes", value=config.max_session_bytes),
        AgreedField(name="num_max_all_gathers_per_session", value=config.max_calls),
    ]


def agreed_by_call(session_idx: int, regions: Sequence[Region]) -> list[AgreedField]:
    """The values of a call that every rank must pass alike; the same fields for any number of tensors.

    Args:
        session_idx: Number of the session.
        regions: Where the tensors are gathered, or their addends arrive; none for the end of a session.
    """
    fields = [
        AgreedField(name="session", value=session_idx, show=lambda idx: f"number {idx} of this buffer"),
        AgreedField(name="number of tensors", value=len(regions)),
    ]
    for idx in range(_NUM_SHOWN_TENSORS):
        region = regions[idx] if idx < len(regions) else None
        fields += [
            AgreedField(name=f"number of elements of tensor {idx}", value=region.num_elements if region else 0),
            AgreedField.of_dtype(f"dtype of tensor {idx}", region.dtype if region else None),
        ]
    mine = [(list(region.shape), str(region.dtype).removeprefix("torch.")) for region in regions]
    code = zlib.crc32(repr(mine).encode())
    shown = ", ".join(f"{shape} {dtype}" for shape, dtype in mine)
    fields.append(
        AgreedField(name="list of shapes", value=code, show=lambda value: shown if value == code else "others")
    )
    # Not the same where a call has failed on one rank behind the meeting of the ranks.
    fields.append(AgreedField(name="place in the session", value=regions[0].offset if regions else 0))
    return fields


def digest_of_call(operation: str, session_idx: int, regions: Sequence[Region]) -> int:
    """A number of 32 bits which calls that agree share, and others share hardly ever.

    Args:
        operation: One of `OPERATIONS`.
        session_idx: Number of the session.
        regions: As in `agreed_by_call`.
    """
    kinds = [(region.offset, region.shape, region.dtype) for region in regions]
    return zlib.crc32(repr((operation, session_idx, kinds)).encode())
