"""Owns the mirrors of what a rank's kernels keep between operations, and the names of their phases."""

from __future__ import annotations

import ctypes

from deep_ep_core.jit.structs import ParamsStruct, UInt32, UInt64
from deep_ep_core.lsa_team import MAX_LSA_RANKS

__all__ = ["ARRIVALS_BYTES", "PHASES", "PHASE_DISAGREE", "PHASE_INVALID", "RANK_STATE_BYTES", "Arrivals", "RankState"]

PHASES = (
    "the opening of the operation",
    "the exchange of row counts",
    "the meeting of this rank's blocks",
    "a copy into shared memory",
    "the arrival of dispatched rows",
    "the arrival of rows to combine",
    "the reading of rows to combine",
    "the agreement of the ranks",
    "the check of topk_idx",
)
"""What the phases of all kernels are called, in the order of the constants in `rank_state.cuh`."""

PHASE_DISAGREE = 7
"""No wait: ranks opened an operation with different arguments."""

PHASE_INVALID = 8
"""No wait: a rank's `topk_idx` names an expert that does not exist, or one twice."""


class RankState(ParamsStruct):
    """Device memory of a rank, all zero at first; mirror of the struct in `rank_state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::RankState"
    _fields_ = (
        ("epoch", UInt64),
        ("num_arrived", UInt64 * MAX_LSA_RANKS),
        ("num_sides", UInt64 * MAX_LSA_RANKS),
        ("num_pushed", UInt64 * MAX_LSA_RANKS),
        ("num_pulled", UInt64 * MAX_LSA_RANKS),
        ("grid_count", UInt32),
        ("grid_generation", UInt32),
        ("num_exited", UInt32),
        ("invalid_token", UInt32),
    )


class Arrivals(ParamsStruct):
    """Words that peers add to, in the window; mirror of the struct in `rank_state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_ep::Arrivals"
    _fields_ = (
        ("num_arrived", UInt64 * MAX_LSA_RANKS),
        ("num_sides", UInt64 * MAX_LSA_RANKS),
        ("num_pushed", UInt64 * MAX_LSA_RANKS),
        ("num_pulled", UInt64 * MAX_LSA_RANKS),
    )


RANK_STATE_BYTES = ctypes.sizeof(RankState)
ARRIVALS_BYTES = ctypes.sizeof(Arrivals)
