"""Owns where a rank stands: the world, its scale-up domain (load/store reach, NVLink) and the scale-out domain across.

It does not decide which domain an operation uses, and never assumes a number of GPUs per node.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from deep_ep_core.errors import TopologyError

__all__ = ["Topology", "host_identity", "scaleup_size_from_hosts"]

# The kernel's identity of this boot: two containers of one machine share it, two machines never do.
_BOOT_ID_PATH = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """The place of one rank. Ranks of a scale-up domain are contiguous: rank = scaleout_rank * V + scaleup_rank.

    Attributes:
        rank: This rank in the group.
        num_ranks: Number of ranks in the group, N.
        num_scaleup_ranks: Number of ranks of a scale-up domain, V; divides N.

    Raises:
        TopologyError: V does not divide N, or the rank is outside the group.
    """

    rank: int
    num_ranks: int
    num_scaleup_ranks: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise TopologyError(f"a rank must lie in [0, {self.num_ranks}) (got {self.rank})")
        if self.num_scaleup_ranks < 1 or self.num_ranks % self.num_scaleup_ranks != 0:
            raise TopologyError(
                f"the scale-up domain must divide the group: {self.num_ranks} ranks cannot be cut into domains of "
                f"{self.num_scaleup_ranks} (on rank {self.rank}); give every node the same number of ranks, or set "
                f"NCCL_LSA_TEAM_SIZE to a divisor of {self.num_ranks}"
            )

    @property
    def num_scaleout_ranks(self) -> int:
        """Number of scale-up domains in the group, R."""
        return self.num_ranks // self.num_scaleup_ranks

    @property
    def scaleup_rank(self) -> int:
        """This rank's index in its scale-up domain."""
        return self.rank % self.num_scaleup_ranks

    @property
    def scaleout_rank(self) -> int:
        """Index of this rank's scale-up domain."""
        return self.rank // self.num_scaleup_ranks

    def flattened(self) -> Topology:
        """The same ranks seen as one scale-up domain, for operations that do not use the hierarchy."""
        return Topology(rank=self.rank, num_ranks=self.num_ranks, num_scaleup_ranks=self.num_ranks)


def host_identity() -> str:
    """A text that two processes share if, and only if, they run on the same booted machine."""
    try:
        return _BOOT_ID_PATH.read_text().strip()
    except OSError:
        return socket.gethostname()


def scaleup_size_from_hosts(hosts: Sequence[str], team_size: int | None = None) -> int:
    """Number of ranks in a scale-up domain, from the host of each rank.

    Args:
        hosts: The `host_identity()` of each rank, by rank.
        team_size: Make-believe domain size (`NCCL_LSA_TEAM_SIZE`), or None.

    Returns:
        The largest size that cuts the ranks into equal domains none of which spans two hosts, and that divides
        `team_size` where one is given.

    Raises:
        TopologyError: `team_size` does not cut the ranks into equal domains.
    """
    # A greatest common divisor, since ranks 0-2 on one host and rank 3 on another still form domains of one.
    size = math.gcd(*(len(list(run)) for _, run in groupby(hosts)))
    if team_size is None:
        return size
    if team_size < 1 or len(hosts) % team_size != 0:
        raise TopologyError(
            f"NCCL_LSA_TEAM_SIZE must be a divisor of the number of ranks, {len(hosts)} (got {team_size}); "
            "change it, or unset it to use the machine's own domains"
        )
    return math.gcd(size, team_size)
