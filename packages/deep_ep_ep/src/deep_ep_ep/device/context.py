"""Owns what the operations of one device backend share: window, device state, kernels, and the news of failures.

It moves nothing: `dispatch` and `combine` do.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from deep_ep_core.align import ceil_div
from deep_ep_core.barrier import LSA_BARRIER_SLOT_BYTES, LsaBarrier
from deep_ep_core.errors import TransportError
from deep_ep_core.jit import KernelSpec, LaunchShape, PreparedLaunch, get_kernel
from deep_ep_core.lsa_team import MAX_LSA_RANKS, LsaTeam, make_lsa_team
from deep_ep_core.nccl import Communicator
from deep_ep_core.transport import AgreedField
from deep_ep_core.wait import TimeoutLog, WaitParams
from deep_ep_core.window import ControlRegion, SymmetricMemory
from deep_ep_ep.device.failures import raise_failure
from deep_ep_ep.device.opening import OPENING_SLOTS_BYTES
from deep_ep_ep.device.state import ARRIVALS_BYTES, PHASES, RANK_STATE_BYTES

__all__ = [
    "MAX_NUM_EXPERTS",
    "DeviceContext",
    "OperationContext",
    "RecvMemory",
    "StreamBarrier",
    "WindowSizes",
    "window_sizes",
]

MAX_NUM_EXPERTS = 1920
"""The most experts that a plan has shared memory for, on any number of ranks that a team may have."""

RecvMemory = Literal["auto", "window", "torch"]
"""Where received rows live: see `ElasticBuffer`."""

_OPENING = "ep.opening"
_COUNTS = "ep.counts"
_ARRIVALS = "ep.arrivals"
_BARRIER = "ep.barrier"
_STAGE = "ep.stage"
_MESSAGE_BYTES = 16
# Room for the alignment of the parts of the stage.
_STAGE_SLACK_BYTES = 4096
# With more ranks than this, rows of one rank are far fewer than the worst case: a token has rarely more experts.
_MAX_KEPT_RANKS = 8
_POLLS_PER_QUERY = 4096
# Of under a microsecond each.
_POLLS_IN_A_ROW = 1000


class StreamBarrier(Protocol):
    """A barrier between the streams of all ranks."""

    def enqueue(self, stream: torch.cuda.Stream | None = None) -> None:
        """Put the barrier into a stream; None takes the current one. Collective: yes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowSizes:
    """How the memory of a buffer is divided.

    Attributes:
        stage_bytes: Memory of one operation at a time: side records, and rows that are copied on.
        heap_bytes: Memory of results that stay in the window.
    """

    stage_bytes: int
    heap_bytes: int


def window_sizes(num_bytes: int, *, num_ranks: int, recv_memory: RecvMemory) -> WindowSizes:
    """Divide the memory of a buffer.

    "torch" has a stage of `num_bytes`, which is the worst case of one operation. "auto" has the same and beside it a
    heap for results: `num_bytes` on up to 8 ranks, and 8 / num_ranks of it on more. "window" has only a heap, of
    `num_bytes`.

    Args:
        num_bytes: Size of the buffer, as callers give it.
        num_ranks: Ranks of the group.
        recv_memory: Where received rows live.
    """
    if recv_memory == "window":
        return WindowSizes(stage_bytes=0, heap_bytes=num_bytes)
    kept = 0 if recv_memory == "torch" else ceil_div(num_bytes * min(num_ranks, _MAX_KEPT_RANKS), num_ranks)
    return WindowSizes(stage_bytes=num_bytes + _STAGE_SLACK_BYTES, heap_bytes=kept)


class OperationContext:
    """What contexts have in common, whoever their ranks reach.

    Args:
        communicator: The ranks.
        recv_memory: Where received rows live; the same on every rank.
        num_gpu_ranks: Ranks that run on this rank's GPU.

    Attributes:
        communicator: The ranks.
        device: Device of this rank.
        device_idx: Its index.
        rank, num_ranks: This rank's place in the group.
        recv_memory: Where received rows live.
        memory: The window.
        barrier: Lets the streams of all ranks meet.
        shares_gpu: Whether all ranks run on one GPU.
        max_num_sms: The most SMs that a kernel of this rank may take: those of the ranks that share a GPU wait for each
            other, so all must fit it at once.
        log: Where kernels report what went wrong.
        state_address: The rank's `RankState`.
        host_counts_address: Where kernels tell the host counts, behind a stamp.
        fields: What the operation that runs must agree on, to name what does not.
        num_failures: Failures that were raised; ranks that can go on after one have all been told of it.
    """

    memory: SymmetricMemory
    barrier: StreamBarrier

    def __init__(self, communicator: Communicator, *, recv_memory: RecvMemory, num_gpu_ranks: int) -> None:
        self.communicator = communicator
        self.device = communicator.device
        assert self.device.index is not None, "a communicator knows which device it is on"
        self.device_idx: int = self.device.index
        self.rank, self.num_ranks = communicator.rank, communicator.num_ranks
        self.recv_memory = recv_memory
        self.shares_gpu = num_gpu_ranks == self.num_ranks
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.max_num_sms = max(num_sms // num_gpu_ranks, 1)
        self._state = torch.zeros(RANK_STATE_BYTES, dtype=torch.uint8, device=self.device)
        self.state_address: int = self._state.data_ptr()
        self.log = TimeoutLog(rank=self.rank, device=self.device)
        # A stamp, then what it stands for. Of the experts of one rank there are never more than of all.
        self.host_counts = torch.zeros(2 + MAX_NUM_EXPERTS, dtype=torch.int32, pin_memory=True)
        self.host_counts_address: int = self.host_counts.data_ptr()
        self._host_words = (ctypes.c_int32 * self.host_counts.numel()).from_address(self.host_counts.data_ptr())
        self.fields: tuple[AgreedField, ...] = ()
        self.num_failures = 0
        self._launches: dict[object, PreparedLaunch] = {}

    def launch(self, key: object, make: Callable[[], tuple[KernelSpec, LaunchShape]]) -> PreparedLaunch:
        """The launch that belongs to a key; made, and its kernel compiled, the first time."""
        found = self._launches.get(key)
        if found is None:
            spec, shape = make()
            found = self._launches[key] = PreparedLaunch(get_kernel(spec, self.device_idx), shape)
        return found

    def check(self) -> None:
        """Raise what a kernel has reported. No CUDA call.

        Raises:
            RankMismatchError: Ranks opened an operation with different arguments.
            ConfigError: A rank passed expert ids that cannot be.
            CommTimeoutError: A rank did not come.
        """
        if self.log.has_record:
            self.num_failures += 1
            raise_failure(self.log, self.fields, self._opened_values)

    def begin(self, fields: Sequence[AgreedField]) -> None:
        """An operation begins, with what its ranks must agree on. Raises what an earlier one has reported."""
        self.check()
        self.fields = tuple(fields)

    def wait_for_counts(self, stamp: int) -> None:
        """Wait on the host until the counts with a stamp are in `host_counts`.

        Other threads may run meanwhile, but for the first millisecond or so.

        Args:
            stamp: What the kernel was told to set.

        Raises:
            RankMismatchError, ConfigError, CommTimeoutError: As `check`: the kernel has given up.
            TransportError: The stream ended without the counts.
        """
        words, num_polls = self._host_words, 0
        while words[0] != stamp:
            self.check()
            num_polls += 1
            # A CUDA call now and then tells of a kernel that died.
            if num_polls % _POLLS_PER_QUERY == 0 and torch.cuda.current_stream(self.device).query():
                self.check()
                if words[0] != stamp:
                    raise TransportError(
                        f"the kernel that counts rows must tell the counts (got none, on rank {self.rank}); an earlier "
                        "CUDA error in this process is the usual cause"
                    )
            # Lets other threads have the interpreter. It takes 56 us on the machine of the benchmarks, where the counts
            # of a few tokens come within 20 us of the last rank's launch.
            if num_polls > _POLLS_IN_A_ROW:
                time.sleep(0)

    def read_counts(self, num_counts: int) -> list[int]:
        """What stands behind the stamp in `host_counts`."""
        return self._host_words[1 : 1 + num_counts]

    def close(self) -> None:
        """Let go of the window; a second call does nothing. Collective: no."""
        self.memory.close()

    def _opened_values(self, value_idx: int) -> list[int | None]:
        """What each rank opened the last operation with, at a place among the agreed values; None: it has not yet."""
        raise NotImplementedError


class DeviceContext(OperationContext):
    """The memory and the kernels of one buffer on one rank, where one LSA team holds all ranks.

    Args:
        communicator: The ranks, all of one LSA team.
        num_bytes: Size of the buffer.
        recv_memory: Where received rows live; the same on every rank.
        timeout_s: How long a kernel waits for a peer.
        num_gpu_ranks: Ranks that run on this rank's GPU.

    Attributes:
        team: The table of the team, for kernel parameters.
        wait: Deadlines, for kernel parameters.
        stage_offset: Offset of the stage in the window; None in a buffer that has none.
        counts_capacity: Pairs of columns that the counts of a rank have room for.

    Raises:
        TransportError: There is not enough memory, or NCCL could not register it.

    Collective: the constructor is; `close` is not.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        num_bytes: int,
        recv_memory: RecvMemory,
        timeout_s: float,
        num_gpu_ranks: int,
    ) -> None:
        super().__init__(communicator, recv_memory=recv_memory, num_gpu_ranks=num_gpu_ranks)
        num_ranks = self.num_ranks
        self.counts_capacity = ceil_div(num_ranks + MAX_NUM_EXPERTS, 2)
        sizes = window_sizes(num_bytes, num_ranks=num_ranks, recv_memory=recv_memory)
        regions = [
            ControlRegion(name=_OPENING, num_bytes=OPENING_SLOTS_BYTES),
            ControlRegion(name=_COUNTS, num_bytes=2 * num_ranks * self.counts_capacity * _MESSAGE_BYTES),
            ControlRegion(name=_ARRIVALS, num_bytes=ARRIVALS_BYTES),
            ControlRegion(name=_BARRIER, num_bytes=LSA_BARRIER_SLOT_BYTES),
        ]
        if sizes.stage_bytes:
            regions.append(ControlRegion(name=_STAGE, num_bytes=sizes.stage_bytes, alignment=256))
        self.memory = SymmetricMemory(communicator, regions=regions, heap_bytes=sizes.heap_bytes)
        layout = self.memory.layout
        self.opening_offset = layout.offset_of(_OPENING)
        self.counts_offset = layout.offset_of(_COUNTS)
        self.arrivals_offset = layout.offset_of(_ARRIVALS)
        self.stage_offset = layout.offset_of(_STAGE) if sizes.stage_bytes else None
        self.stage_bytes = sizes.stage_bytes
        self.wait: WaitParams = self.log.params(first_phase=self.log.add_phases(PHASES), timeout_s=timeout_s)
        self.team: LsaTeam = make_lsa_team(self.memory, rank=self.rank)
        self.barrier: StreamBarrier = LsaBarrier(
            self.memory,
            slot_offset=layout.offset_of(_BARRIER),
            rank=self.rank,
            log=self.log,
            timeout_s=timeout_s,
            phase="barrier",
        )
        # What other streams used last is done: kernels of the communication stream may begin.
        torch.cuda.current_stream(self.device).synchronize()

    def _opened_values(self, value_idx: int) -> list[int | None]:
        """What each rank opened the last operation with, at a place among the agreed values; None: it has not yet."""
        slots = self.memory.control(_OPENING, torch.int64).view(2, MAX_LSA_RANKS, -1, 2)
        epoch = int(self._state[:8].view(torch.int64).item())
        words = slots[epoch % 2, : self.num_ranks, value_idx // 2, value_idx % 2].tolist()
        # Above the value stands the epoch that it is of.
        stamp, mask = epoch & 0xFFFFFFFF, 0xFFFFFFFF
        return [word & mask if word >> 32 & mask == stamp else None for word in words]

    def __repr__(self) -> str:
        return f"DeviceContext(rank {self.rank} of {self.num_ranks}, {self.recv_memory}, {self.memory!r})"
