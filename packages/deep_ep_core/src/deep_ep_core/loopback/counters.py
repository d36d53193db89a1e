"""Owns the reading of what the loopback network counted; the plugin's `counters.h` says what it counts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from deep_ep_core.errors import ConfigError

__all__ = ["PeerCounts", "read_counters"]

_HEADER = struct.Struct("=8sII")
_PEER = struct.Struct("=6Q")
_MAGIC = b"eploopc1"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCounts:
    """What one rank asked its network to do toward one peer, since the network was made.

    Attributes:
        num_puts: Puts with a payload.
        put_bytes: Their payload, in bytes.
        num_signals: Signals, with a put or alone.
        num_gets: Gets.
        get_bytes: Bytes asked for.
        num_flushes: Flushes that reached the network.
    """

    num_puts: int = 0
    put_bytes: int = 0
    num_signals: int = 0
    num_gets: int = 0
    get_bytes: int = 0
    num_flushes: int = 0

    def __add__(self, other: PeerCounts) -> PeerCounts:
        return _peer_counts([a + b for a, b in zip(astuple(self), astuple(other), strict=True)])

    def __sub__(self, other: PeerCounts) -> PeerCounts:
        return _peer_counts([a - b for a, b in zip(astuple(self), astuple(other), strict=True)])


def read_counters(folder: Path) -> dict[int, tuple[PeerCounts, ...]]:
    """The counts of every rank that wrote into a folder, summed over its connections. Not collective.

    Args:
        folder: What `EP_LOOPBACK_COUNTERS` named.

    Returns:
        By rank, the counts toward each peer. Ranks are those of NCCL's communicator.

    Raises:
        ConfigError: Connections of one rank differ in size, so they belong to different communicators.
    """
    totals: dict[int, tuple[PeerCounts, ...]] = {}
    for path in sorted(folder.glob("rank*.counters")):
        content = path.read_bytes()
        if len(content) < _HEADER.size:
            continue
        magic, rank, num_ranks = _HEADER.unpack_from(content)
        if magic != _MAGIC:
            # Being made at this moment.
            continue
        peers = tuple(
            _peer_counts(_PEER.unpack_from(content, _HEADER.size + peer * _PEER.size)) for peer in range(num_ranks)
        )
        previous = totals.get(rank, (PeerCounts(),) * num_ranks)
        if len(previous) != num_ranks:
            raise ConfigError(
                f"the counters of one folder must be of one communicator (rank {rank} has {len(previous)} peers in one "
                f"and {num_ranks} in another of {folder}); give each communicator its own EP_LOOPBACK_COUNTERS"
            )
        totals[rank] = tuple(old + new for old, new in zip(previous, peers, strict=True))
    return totals


def _peer_counts(numbers: Sequence[int]) -> PeerCounts:
    num_puts, put_bytes, num_signals, num_gets, get_bytes, num_flushes = numbers
    return PeerCounts(
        num_puts=num_puts,
        put_bytes=put_bytes,
        num_signals=num_signals,
        num_gets=num_gets,
        get_bytes=get_bytes,
        num_flushes=num_flushes,
    )
