"""Owns what NCCL says of a communicator, as plain Python values: its properties and its teams."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from deep_ep_core.nccl.structs import fixed_dev_comm_bytes

__all__ = ["CommProperties", "GinType", "Team"]


class GinType(IntEnum):
    """How the GPU's own network operations (GIN) reach the network. NCCL's numbers, but for OTHER."""

    NONE = 0
    PROXY = 2
    GDAKI = 3
    GPI = 4
    EFA_GDA = 5
    OTHER = -1

    @classmethod
    def of(cls, value: int) -> GinType:
        """The type of a number that NCCL gave; OTHER where it is newer than this list."""
        return cls(value) if value in cls._value2member_map_ else cls.OTHER


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Every `stride`-th rank of a communicator.

    Attributes:
        num_ranks: How many ranks it has.
        rank: This rank's place in it.
        stride: Distance of neighbours, in ranks of the communicator.
    """

    num_ranks: int
    rank: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CommProperties:
    """What NCCL says of a communicator.

    Attributes:
        rank: This rank.
        num_ranks: Number of ranks.
        device_idx: CUDA device of this rank.
        has_device_api: Whether windows and device communicators work.
        has_multimem: Whether NVLink multicast works.
        has_host_rma: Whether NCCL's stream-ordered one-sided calls work.
        num_lsa_teams: Number of LSA teams.
        gin_type: GIN that reaches any rank.
        railed_gin_type: GIN that reaches at least the ranks of the own rail.
        dev_comm_bytes: `sizeof(ncclDevComm)` in headers of the library's version.
    """

    rank: int
    num_ranks: int
    device_idx: int
    has_device_api: bool
    has_multimem: bool
    has_host_rma: bool
    num_lsa_teams: int
    gin_type: GinType
    railed_gin_type: GinType
    dev_comm_bytes: int

    @classmethod
    def read(cls, found: Any, library_version: int) -> CommProperties:
        """The values of an `ncclCommProperties` that a library of that version filled."""
        dev_comm_bytes = fixed_dev_comm_bytes(library_version)
        return cls(
            rank=found.rank,
            num_ranks=found.nRanks,
            device_idx=found.cudaDev,
            has_device_api=found.deviceApiSupport,
            has_multimem=found.multimemSupport,
            has_host_rma=found.hostRmaSupport,
            num_lsa_teams=found.nLsaTeams,
            gin_type=GinType.of(found.ginType),
            railed_gin_type=GinType.of(found.railedGinType),
            dev_comm_bytes=found.devCommRuntimeVersionSize if dev_comm_bytes is None else dev_comm_bytes,
        )
