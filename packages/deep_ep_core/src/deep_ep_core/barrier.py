"""Owns the barrier of an LSA team as an operation of a stream: the kernel `comm/lsa_barrier_kernel.cuh` and its launch.

Kernels that need a barrier inside call `comm/lsa_barrier.cuh` themselves. It does not span LSA teams.
"""

from __future__ import annotations

import ctypes

import torch

from deep_ep_core.align import align_up
from deep_ep_core.errors import ConfigError
from deep_ep_core.jit import Builder, KernelSpec, LaunchShape, PreparedLaunch, get_kernel, package_include_dir
from deep_ep_core.jit.structs import ParamsStruct, UInt64
from deep_ep_core.lsa_team import MAX_LSA_RANKS, LsaMemory, LsaTeam, make_lsa_team
from deep_ep_core.wait import TimeoutLog, WaitParams

__all__ = ["LSA_BARRIER_SLOT_BYTES", "LsaBarrier", "LsaBarrierParams", "LsaBarrierSlot", "lsa_barrier_spec"]

_WARP_THREADS = 32
_WORD_BYTES = 8


class LsaBarrierSlot(ParamsStruct):
    """The memory of a barrier between one block of each rank; mirror of the struct in `comm/lsa_barrier.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_core::comm::LsaBarrierSlot"
    _fields_ = (
        ("arrived", UInt64 * MAX_LSA_RANKS),
        ("epoch", UInt64),
        ("padding", UInt64 * 7),
    )


LSA_BARRIER_SLOT_BYTES = ctypes.sizeof(LsaBarrierSlot)
"""Bytes of the control area that a barrier needs for each block that takes part. Zero at first, never reset."""


class LsaBarrierParams(ParamsStruct):
    """Parameters of the barrier kernel; mirror of the struct in `comm/lsa_barrier_kernel.cuh`."""

    __slots__ = ()
    cuda_name = "deep_ep_core::comm::LsaBarrierParams"
    _fields_ = (
        ("team", LsaTeam),
        ("wait", WaitParams),
        ("slot_offset", UInt64),
    )


def lsa_barrier_spec() -> KernelSpec:
    """The barrier kernel; one variant serves teams of any size."""
    return KernelSpec(
        label="lsa_barrier",
        header="deep_ep_core/comm/lsa_barrier_kernel.cuh",
        function="deep_ep_core::comm::run_lsa_barrier",
        params_type=LsaBarrierParams,
        include_dirs=(package_include_dir("deep_ep_core"),),
        # A thread a peer.
        max_threads_per_block=align_up(MAX_LSA_RANKS, _WARP_THREADS),
    )


class LsaBarrier:
    """A barrier between the streams of all ranks of an LSA team.

    What a rank's stream did before it, to any rank's memory, is visible to what any rank's stream does after it. It may
    be captured in a CUDA graph.

    Args:
        memory: The memory of the team, with a control area.
        slot_offset: Offset of this barrier's slot there, the same on every rank: `LSA_BARRIER_SLOT_BYTES` bytes, zero
            at first, that nothing else uses.
        rank: This rank, in the group.
        log: Where a timeout is reported.
        timeout_s: How long a rank waits for its peers, in seconds, from when its kernel starts.
        phase: What a timeout is called.
        builder: Compiles the kernel; None takes the one with the options of the environment.

    Raises:
        ConfigError: The offset or the timeout is off, or the memory is not of this rank.
        TopologyError: The team is larger than kernels can take.
        CompileError: The kernel does not compile.

    Collective: the constructor is not, each `enqueue` is.
    """

    def __init__(
        self,
        memory: LsaMemory,
        *,
        slot_offset: int,
        rank: int,
        log: TimeoutLog,
        timeout_s: float,
        phase: str = "barrier",
        builder: Builder | None = None,
    ) -> None:
        self.device = memory.device
        self.params = _make_params(memory, slot_offset, rank, log, timeout_s, phase)
        # What the kernel reaches by address alone.
        self._kept_alive = (memory, log)
        kernel = get_kernel(lsa_barrier_spec(), _device_idx(self.device), builder=builder)
        num_threads = align_up(self.params.team.num_ranks, _WARP_THREADS)
        self._launch = PreparedLaunch(kernel, LaunchShape(grid=(1, 1, 1), block=(num_threads, 1, 1)))

    def enqueue(self, stream: torch.cuda.Stream | None = None) -> None:
        """Put the barrier into a stream. Does not wait on the host, and raises nothing for a rank that is late.

        A timeout is in the log once the kernel has ended. Calls follow each other in one order: either in one stream,
        or in streams that wait for each other.

        Args:
            stream: A stream of the device; None takes its current one.

        Raises:
            TransportError: The launch fails.

        Stream: launches on `stream`. Collective: yes, in the LSA team: each rank enqueues it equally often.
        """
        self._launch(self.params, (stream or torch.cuda.current_stream(self.device)).cuda_stream)

    def __repr__(self) -> str:
        team = self.params.team
        return f"LsaBarrier(rank {team.first_rank + team.rank}, LSA team of {team.num_ranks}, {self.device})"


def _make_params(
    memory: LsaMemory, slot_offset: int, rank: int, log: TimeoutLog, timeout_s: float, phase: str
) -> LsaBarrierParams:
    if slot_offset < 0 or slot_offset % _WORD_BYTES:
        raise ConfigError(
            f"slot_offset of {phase} must be a multiple of {_WORD_BYTES} bytes (got {slot_offset} on rank {rank})"
        )
    wait = log.params(first_phase=log.add_phases([phase]), timeout_s=timeout_s)
    return LsaBarrierParams(team=make_lsa_team(memory, rank=rank), wait=wait, slot_offset=slot_offset)


def _device_idx(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
