"""Owns the table through which kernels reach the windows of an LSA team: the mirror of `comm/lsa_team.cuh`.

It does not make windows: `deep_ep_core.window` does.
"""

from __future__ import annotations

from typing import Protocol

import torch

from deep_ep_core.errors import ConfigError, TopologyError
from deep_ep_core.jit.structs import Int32, ParamsStruct, Pointer

__all__ = ["MAX_LSA_RANKS", "LsaMemory", "LsaTeam", "make_lsa_team"]

MAX_LSA_RANKS = 72
"""The most ranks that a team may have: the GPUs of the largest NVLink domain (NVL72). `kMaxLsaRanks` in the header."""


class LsaTeam(ParamsStruct):
    """The windows of a team, as part of a kernel's parameters."""

    __slots__ = ()
    cuda_name = "deep_ep_core::comm::LsaTeam"
    _fields_ = (
        ("windows", Pointer * MAX_LSA_RANKS),
        ("rank", Int32),
        ("num_ranks", Int32),
        ("first_rank", Int32),
    )


class LsaMemory(Protocol):
    """Memory of every rank of an LSA team, each reached by all: `deep_ep_core.window.SymmetricMemory`."""

    @property
    def device(self) -> torch.device:
        """Device of this rank's memory."""

    @property
    def address(self) -> int:
        """Where this rank sees its own memory."""

    def lsa_addresses(self) -> tuple[int, ...]:
        """Where this rank sees the memory of each rank of the team, in their order there; `address` among them."""


def make_lsa_team(memory: LsaMemory, *, rank: int) -> LsaTeam:
    """The table of a team, for the parameters of this rank's kernels.

    Args:
        memory: The memory.
        rank: This rank, in the group. The ranks of a team are consecutive there.

    Raises:
        TopologyError: The team is larger than kernels can take.
        ConfigError: The memory does not list this rank's own address.

    Collective: no.
    """
    addresses = memory.lsa_addresses()
    if len(addresses) > MAX_LSA_RANKS:
        raise TopologyError(
            f"an LSA team must have at most {MAX_LSA_RANKS} ranks (got {len(addresses)} on rank {rank}); set "
            "NCCL_LSA_TEAM_SIZE to cut it into smaller ones"
        )
    if memory.address not in addresses:
        raise ConfigError(
            f"the addresses of an LSA team must include this rank's own, {memory.address:#x} (got "
            f"{', '.join(map(hex, addresses)) or 'none'} on rank {rank}); pass memory whose team this rank is in"
        )
    lsa_rank = addresses.index(memory.address)
    return LsaTeam(windows=addresses, rank=lsa_rank, num_ranks=len(addresses), first_rank=rank - lsa_rank)
