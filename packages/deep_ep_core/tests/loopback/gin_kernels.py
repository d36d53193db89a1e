"""The kernel that plays every operation of `comm/gin.cuh` around a ring; GPU scripts and tests import it by name."""

from __future__ import annotations

from pathlib import Path

from deep_ep_core.jit import KernelSpec, package_include_dir
from deep_ep_core.jit.structs import Int32, ParamsStruct, Pointer, UInt64, opaque
from deep_ep_core.wait import WaitParams

INCLUDE_DIRS = (package_include_dir("deep_ep_core"), Path(__file__).resolve().parent / "include")
HEADER = "loopback_tests/gin_ring.cuh"
PHASES = ("put with signal", "strong signal", "put of a value")
WORD_STEP = 3
NUM_THREADS = 128


def ring_params_type(dev_comm_bytes: int) -> type[ParamsStruct]:
    """The mirror of `GinRingParams` for an `ncclDevComm` of that size."""

    class GinRingParams(ParamsStruct):
        __slots__ = ()
        cuda_name = "loopback_tests::GinRingParams"
        _fields_ = (
            ("dev_comm", opaque(dev_comm_bytes)),
            ("window", Pointer),
            ("wait", WaitParams),
            ("source_offset", UInt64),
            ("signalled_offset", UInt64),
            ("covered_offset", UInt64),
            ("fetched_offset", UInt64),
            ("value_offset", UInt64),
            ("word_offset", UInt64),
            ("num_bytes", UInt64),
            ("round", UInt64),
            ("word_round", UInt64),
            ("timeout_cycles", UInt64),
            ("is_world", Int32),
            ("context_idx", Int32),
            ("has_local_waits", Int32),
        )

    return GinRingParams


def ring_spec(params_type: type[ParamsStruct]) -> KernelSpec:
    return KernelSpec(
        label="gin_ring",
        header=HEADER,
        function="loopback_tests::gin_ring",
        params_type=params_type,
        include_dirs=INCLUDE_DIRS,
        max_threads_per_block=NUM_THREADS,
        needs_nccl=True,
    )
