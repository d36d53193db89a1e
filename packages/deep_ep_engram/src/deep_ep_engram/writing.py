"""Owns the agreement that opens a write: every backend asks the ranks for the same things, in the same words."""

from __future__ import annotations

from deep_ep_core.transport import CollectiveTransport
from deep_ep_engram.checks import TableShape, WriteArgs, agreed_by_write, check_sf_rows

__all__ = ["agree_on_write"]


def agree_on_write(transport: CollectiveTransport, args: WriteArgs) -> TableShape:
    """What the table will be, once all ranks have come with arguments that fit.

    Args:
        transport: The group's transport, with an operation "engram_write".
        args: The arguments of this rank.

    Raises:
        RankMismatchError: Ranks passed different shapes, dtypes or device types.
        ConfigError: The scales are not those of all entries; raised on every rank.
        CommTimeoutError: A rank died or is late.

    Collective: yes.
    """
    storage = args.storage
    operation = transport.begin("engram_write", agreed_by_write(args), [[len(storage)]] * transport.num_ranks)
    shape = TableShape(
        num_entries_of_rank=tuple(values[0] for values in operation.peer_values),
        hidden=storage.size(1),
        dtype=storage.dtype,
        device=storage.device,
        num_packs=args.num_packs,
    )
    check_sf_rows(transport.rank, args, shape.num_entries)
    return shape
