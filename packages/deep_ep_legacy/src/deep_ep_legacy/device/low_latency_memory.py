"""Owns the memory of low-latency calls on the device: slabs and signals in the window, and the state of a rank.

The structs are mirrors of `low_latency/state.cuh`; slots are divided by `dispatch_params.cuh` and `combine_params.cuh`.
"""

from __future__ import annotations

import ctypes

import torch

from deep_ep_core.align import align_up
from deep_ep_core.jit.structs import ParamsStruct, UInt32, UInt64
from deep_ep_core.lsa_team import MAX_LSA_RANKS
from deep_ep_core.window import ControlRegion
from deep_ep_legacy.low_latency_fp8 import CHANNELS_PER_SCALE

__all__ = [
    "MAX_NUM_EXPERTS",
    "MAX_NUM_TOKENS",
    "MAX_NUM_TOPK",
    "NOTES",
    "PHASES",
    "SIGNALS",
    "SLABS",
    "STATE_BYTES",
    "LatencyState",
    "Signals",
    "combine_slot_bytes",
    "dispatch_slot_bytes",
    "latency_regions",
    "slab_bytes",
    "told_of",
]

MAX_NUM_EXPERTS = 4096
"""The most experts that there are signals for."""

MAX_NUM_TOKENS = 65535
"""The most tokens of a rank: a count travels in 16 bits."""

MAX_NUM_TOPK = 512
"""The most selections of a token: a block finds the slots of a token at once."""

SLABS = "low_latency.slabs"
SIGNALS = "low_latency.signals"

PHASES = (
    "low latency: the receipt of an earlier call by a rank",
    "low latency: the arrival of dispatched rows",
    "low latency: the arrival of rows to combine",
    "low latency: this rank's first block",
)
"""What the kernels wait for, in the order of the constants in `state.cuh`."""

NOTES = (
    "low latency: other sizes or flags",
    "low latency: wrong experts",
    "low latency: an expert more than once",
)
"""What the kernels report without a wait, likewise."""

_SLAB_ALIGNMENT = 128
_NUM_HALVES = 2


class LatencyState(ParamsStruct):
    """Device memory of a rank, all zero at first; mirror of the struct in `state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::low_latency::LatencyState"
    _fields_ = (
        ("num_sent", UInt64),
        ("num_done_sending", UInt32),
        ("num_done_receiving", UInt32),
        ("told", (UInt64 * MAX_LSA_RANKS) * _NUM_HALVES),
        ("decided", UInt64 * MAX_NUM_EXPERTS),
    )


class Signals(ParamsStruct):
    """Words in the window that peers write; mirror of the struct in `state.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_legacy::low_latency::Signals"
    _fields_ = (
        ("counts", (UInt64 * MAX_NUM_EXPERTS) * _NUM_HALVES),
        ("flags", (UInt64 * MAX_LSA_RANKS) * _NUM_HALVES),
        ("received", (UInt64 * MAX_LSA_RANKS) * _NUM_HALVES),
    )


STATE_BYTES = ctypes.sizeof(LatencyState)


def told_of(state: torch.Tensor) -> torch.Tensor:
    """`LatencyState.told` in a state, int64 `[2, MAX_LSA_RANKS]`.

    Args:
        state: The state's bytes.
    """
    field = LatencyState.told
    return state[field.offset : field.offset + field.size].view(torch.int64).view(_NUM_HALVES, MAX_LSA_RANKS)


def latency_regions(num_rdma_bytes: int) -> tuple[ControlRegion, ...]:
    """The parts of the window for low-latency calls of a buffer of this size."""
    return (
        ControlRegion(name=SIGNALS, num_bytes=ctypes.sizeof(Signals)),
        ControlRegion(name=SLABS, num_bytes=_NUM_HALVES * slab_bytes(num_rdma_bytes)),
    )


def slab_bytes(num_rdma_bytes: int) -> int:
    """Bytes of one of the two slabs.

    V1's size is for rows that are sent and rows that are received, in two halves. Here rows are stored where they are
    received, so a slab is a quarter, and a little more for small rows, whose slots are rounded up. The memory of
    zero-copy buffers is not part of the window.
    """
    return max(num_rdma_bytes * 17 // 64 // _SLAB_ALIGNMENT, 1) * _SLAB_ALIGNMENT


def dispatch_slot_bytes(hidden: int, *, use_fp8: bool) -> int:
    """Bytes of a slot of a dispatch: the row, its scales, and 16 bytes for the token."""
    row_bytes = hidden + hidden // CHANNELS_PER_SCALE * 4 if use_fp8 else 2 * hidden
    return align_up(row_bytes, 16) + 16


def combine_slot_bytes(hidden: int, *, use_logfmt: bool) -> int:
    """Bytes of a slot of a combine: the row, and behind it what LogFMT knows of its groups."""
    return 2 * hidden + (align_up(hidden // CHANNELS_PER_SCALE * 4, 16) if use_logfmt else 0)
