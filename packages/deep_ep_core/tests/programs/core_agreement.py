"""Operations on whose arguments the ranks agree or do not."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from core_exchanges import UNEVEN, make_transport, move, refusal_of

from deep_ep_core import transport as transport_module
from deep_ep_core.transport import AgreedField, CollectiveTransport


def fields(width: int = 256, dtype: torch.dtype | None = torch.bfloat16, mode: int = 0) -> list[AgreedField]:
    return [
        AgreedField(name="width", value=width),
        AgreedField.of_dtype("dtype of x", dtype),
        AgreedField(name="mode", value=mode, show=lambda value: ("slow", "fast")[value]),
    ]


def skip_an_operation(transport: CollectiveTransport) -> None:
    """What an interrupt in the middle of a call would leave behind."""
    transport._num_operations += 1
    transport.begin("move", fields())


def speak_another_version(transport: CollectiveTransport) -> None:
    version = transport_module._PROTOCOL_VERSION
    transport_module._PROTOCOL_VERSION = version + 1
    try:
        transport.begin("move", fields())
    finally:
        transport_module._PROTOCOL_VERSION = version


# What the odd rank does while the others begin a "move" with `fields()`.
ODD_CALLS: dict[str, Callable[[CollectiveTransport], object]] = {
    "value": lambda transport: transport.begin("move", fields(width=-512)),
    "shown value": lambda transport: transport.begin("move", fields(mode=1)),
    "dtype": lambda transport: transport.begin("move", fields(dtype=torch.float8_e4m3fn)),
    "no dtype": lambda transport: transport.begin("move", fields(dtype=None)),
    "operation": lambda transport: transport.begin("turn", fields()),
    "unknown operation": lambda transport: transport.begin("jump", fields()),
    "fewer arguments": lambda transport: transport.begin("move", fields()[:2]),
    "skipped operation": skip_an_operation,
    "version": speak_another_version,
    "two values": lambda transport: transport.begin("move", fields(width=1, mode=1)),
}


def disagree(odd_rank: int, odd_call: str) -> None:
    transport = make_transport()
    transport.begin("turn", [])
    if dist.get_rank() == odd_rank:
        ODD_CALLS[odd_call](transport)
    else:
        transport.begin("move", fields())


def take_turns_in_another_order(odd_rank: int) -> None:
    """Two transports of one group, on which one rank calls the second first."""
    first, second = make_transport(), make_transport()
    (second if dist.get_rank() == odd_rank else first).begin("move", fields())


def agree_after_disagreements() -> list[str]:
    """A disagreement moves nothing, so the transport goes on. Returns what was said, to every rank alike."""
    transport = make_transport()
    rank = dist.get_rank()
    told = []
    for odd_rank in (0, 2):
        mine = fields(width=odd_rank if rank == odd_rank else 256)
        message = refusal_of(lambda mine=mine: transport.begin("move", mine))
        told.append(message.replace(f"on rank {rank}", "on this rank"))
    move(transport, UNEVEN)
    return told


def agree_on_all_that_fits() -> None:
    """The most fields, and the largest and smallest values."""
    transport = make_transport()
    many = [AgreedField(name=f"field {idx}", value=2**63 - 1 if idx % 2 else -(2**63)) for idx in range(24)]
    values = [[2**63 - 1, -(2**63), 0, transport.rank]] * transport.num_ranks
    heard = transport.begin("move", many, values).peer_values
    assert heard == [[2**63 - 1, -(2**63), 0, rank] for rank in range(transport.num_ranks)]


def disagree_on_last_field(odd_rank: int) -> None:
    many = [AgreedField(name=f"field {idx}", value=idx) for idx in range(24)]
    if dist.get_rank() == odd_rank:
        many[-1] = AgreedField(name="field 23", value=2**63 - 1)
    make_transport().begin("move", many, [[5, 5, 5, 5]] * dist.get_world_size())
