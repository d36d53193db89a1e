"""Owns the Python side of the kernels that get entries over the network and wait for them: mirrors and specs.

They take NCCL's device communicator, whose size hangs on NCCL's version, so their parameter structs are made for one.
"""

from __future__ import annotations

import functools

from deep_ep_core.jit import KernelSpec, package_include_dir
from deep_ep_core.jit.structs import Int32, Int64, ParamsStruct, Pointer, UInt64, opaque
from deep_ep_core.wait import WaitParams
from deep_ep_engram.device.fetch_kernel import EntryTable, IndexList

__all__ = ["NETWORK_THREADS", "RowClaims", "get_params_type", "get_rows_spec", "wait_params_type", "wait_rows_spec"]

NETWORK_THREADS = 256
"""Threads of a block. A warp asks for one entry at a time."""


class RowClaims(ParamsStruct):
    """Which row gets an entry; mirror of the struct in `row_claims.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_engram::RowClaims"
    _fields_ = (("keys", Pointer), ("row_of_slot", Pointer), ("slot_of_row", Pointer), ("num_slots", UInt64))


@functools.cache
def get_params_type(dev_comm_bytes: int) -> type[ParamsStruct]:
    """The mirror of `GetParams` in `get_rows.cuh` for an `ncclDevComm` of that size."""

    class GetParams(ParamsStruct):
        __slots__ = ()
        cuda_name = "deep_ep_engram::GetParams"
        _fields_ = (
            ("dev_comm", opaque(dev_comm_bytes)),
            ("window", Pointer),
            ("table", EntryTable),
            ("indices", IndexList),
            ("claims", RowClaims),
            ("has_asked", Pointer),
            ("entries_offset", UInt64),
            ("stage_offset", UInt64),
            ("num_rows", Int64),
            ("row_bytes", Int64),
        )

    return GetParams


@functools.cache
def wait_params_type(dev_comm_bytes: int) -> type[ParamsStruct]:
    """The mirror of `WaitRowsParams` in `wait_rows.cuh` for an `ncclDevComm` of that size."""

    class WaitRowsParams(ParamsStruct):
        __slots__ = ()
        cuda_name = "deep_ep_engram::WaitRowsParams"
        _fields_ = (
            ("dev_comm", opaque(dev_comm_bytes)),
            ("wait", WaitParams),
            ("has_asked", Pointer),
            ("timeout_cycles", UInt64),
            ("num_ranks", Int32),
        )

    return WaitRowsParams


def get_rows_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel that asks for entries."""
    return _spec("get_rows", get_params_type(dev_comm_bytes))


def wait_rows_spec(dev_comm_bytes: int) -> KernelSpec:
    """The kernel that waits for them."""
    return _spec("wait_rows", wait_params_type(dev_comm_bytes))


def _spec(name: str, params_type: type[ParamsStruct]) -> KernelSpec:
    return KernelSpec(
        label=f"engram_{name}",
        header=f"deep_ep_engram/{name}.cuh",
        function=f"deep_ep_engram::{name}",
        params_type=params_type,
        include_dirs=(package_include_dir("deep_ep_core"), package_include_dir("deep_ep_engram")),
        max_threads_per_block=NETWORK_THREADS,
        needs_nccl=True,
    )
