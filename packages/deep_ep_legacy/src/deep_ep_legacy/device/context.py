"""Owns what all kernels of one buffer share: the window, the log of failures, the order of launches.

It moves nothing, and knows neither of the two families of calls: each says what it needs (`FamilyNeeds`), and keeps its
own state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.backend_choice import count_gpu_ranks, open_together
from deep_ep_core.cuda_streams import RecordedEvent
from deep_ep_core.errors import DeepEPError, TopologyError
from deep_ep_core.jit import KernelSpec, LaunchShape, PreparedLaunch, get_kernel, get_kernels
from deep_ep_core.lsa_team import LsaTeam, make_lsa_team
from deep_ep_core.nccl import Communicator
from deep_ep_core.stream_order import CudaStreamOrder
from deep_ep_core.transport import CollectiveTransport
from deep_ep_core.wait import TimeoutLog, TimeoutReport, WaitParams
from deep_ep_core.window import ControlRegion, SymmetricMemory

__all__ = ["DeviceContext", "Explain", "FamilyNeeds", "open_context"]

Explain = Callable[[TimeoutReport], DeepEPError | None]
"""The error for a record that is not of a wait, such as arguments on which ranks disagree; None where it is of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyNeeds:
    """What a family of calls asks of the context.

    Attributes:
        regions: Its parts of the window's control area, all zero at first; the same on every rank.
        heap_bytes: What it adds to the window's heap; the same on every rank.
        kernels: Kernels of its usual calls, compiled when the buffer is made: no rank shall wait for one that compiles.
    """

    regions: tuple[ControlRegion, ...] = ()
    heap_bytes: int = 0
    kernels: tuple[KernelSpec, ...] = ()


class DeviceContext:
    """The window and the kernels of one buffer on one rank.

    Args:
        communicator: The ranks, all of one LSA team.
        needs: What each family of calls asks for.
        timeout_s: How long a kernel waits for a peer.
        num_gpu_ranks: Ranks that run on this rank's GPU.

    Attributes:
        communicator: The ranks.
        device: Device of this rank.
        device_idx: Its index.
        rank, num_ranks: This rank's place in the group; the LSA team is the whole group.
        max_num_sms: The most SMs that a kernel of this rank may take: those of the ranks that share a GPU wait for each
            other, so all must fit it at once.
        memory: The window.
        team: The table of the team, for kernel parameters.
        timeout_s: As above.
        log: Where kernels report what went wrong.

    Raises:
        TopologyError: The ranks are not of one LSA team.
        TransportError: There is not enough memory, or NCCL could not register it.

    Collective: the constructor is; all else is not.
    """

    def __init__(
        self,
        communicator: Communicator,
        *,
        needs: Sequence[FamilyNeeds],
        timeout_s: float,
        num_gpu_ranks: int,
    ) -> None:
        num_ranks = communicator.num_ranks
        if communicator.lsa.num_ranks != num_ranks:
            raise TopologyError(
                f"Buffer's device backend needs all ranks in one LSA team (got teams of {communicator.lsa.num_ranks} "
                f"of {num_ranks} ranks, on rank {communicator.rank}): this version has no V1 kernels for several "
                'nodes; use backend="collective", or unset NCCL_LSA_TEAM_SIZE'
            )
        self.communicator = communicator
        self.device = communicator.device
        assert self.device.index is not None, "a communicator knows which device it is on"
        self.device_idx: int = self.device.index
        self.rank, self.num_ranks = communicator.rank, num_ranks
        num_sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        self.max_num_sms = max(num_sms // num_gpu_ranks, 1)
        self.timeout_s = timeout_s
        self.memory = SymmetricMemory(
            communicator,
            regions=[region for family in needs for region in family.regions],
            heap_bytes=sum(family.heap_bytes for family in needs),
        )
        self.team: LsaTeam = make_lsa_team(self.memory, rank=self.rank)
        self.log = TimeoutLog(rank=self.rank, device=self.device)
        self._explains: list[Explain] = []
        self._launches: dict[object, PreparedLaunch] = {}
        self._order = CudaStreamOrder(self.device)
        # Of the kernel that was launched last: its stream, the capture that it is part of, and the point behind it.
        self._last: tuple[int, int | None, RecordedEvent] | None = None
        get_kernels((spec for family in needs for spec in family.kernels), self.device_idx)

    def wait_params(
        self, phases: Sequence[str], explain: Explain | None = None, *, timeout_s: float | None = None
    ) -> WaitParams:
        """What the waits of a family's kernels need.

        Args:
            phases: What the kernels do while they wait, in the order of the constants in their header. Their names must
                differ from those of the other family.
            explain: Words for records that are not of a wait.
            timeout_s: How long each wait may take; None for that of the context.
        """
        if explain is not None:
            self._explains.append(explain)
        return self.log.params(
            first_phase=self.log.add_phases(phases), timeout_s=self.timeout_s if timeout_s is None else timeout_s
        )

    def offset_of(self, region: str) -> int:
        """Offset of a control region in every rank's window, in bytes."""
        return self.memory.layout.offset_of(region)

    def launch(self, key: object, make: Callable[[], tuple[KernelSpec, LaunchShape]]) -> PreparedLaunch:
        """The launch that belongs to a key; made, and its kernel compiled, the first time."""
        found = self._launches.get(key)
        if found is None:
            spec, shape = make()
            found = self._launches[key] = PreparedLaunch(get_kernel(spec, self.device_idx), shape)
        return found

    def check(self) -> None:
        """Raise what a kernel has reported. No CUDA call where there is nothing.

        After a record that is not of a wait, nothing is missing for good: it is taken out, and the buffer can be used
        again. After a wait that expired it stays.

        Raises:
            CommTimeoutError: A rank did not come.
            DeepEPError: What a family says of its own records.
        """
        report = self.log.read()
        if report is None:
            return
        for explain in self._explains:
            error = explain(report)
            if error is not None:
                self.log.reset()
                raise error
        self.log.check()

    def follow(self, stream: torch.cuda.Stream) -> None:
        """Let a stream wait for the kernel that was launched last, if that was on another stream, and for no more.

        All kernels of a buffer run one after the other: they share device state, and two that wait for peers at once
        need not fit the GPU. Called before each launch, and `launched` after it. Across the border of a capture no
        stream can wait for another; torch waits for the device before it begins one.
        """
        if self._last is None:
            return
        last_stream, capture, event = self._last
        handle = stream.cuda_stream
        if handle != last_stream and self._order.capture_of(handle) == capture:
            event.wait_on(stream)

    def launched(self, stream: torch.cuda.Stream) -> None:
        """Note that a kernel was launched on a stream. Called before anything else goes into the stream."""
        handle = stream.cuda_stream
        self._last = handle, self._order.capture_of(handle), RecordedEvent(stream)

    def close(self) -> None:
        """Let go of the window; a second call does nothing."""
        self.memory.close()

    def __repr__(self) -> str:
        return f"DeviceContext(rank {self.rank} of {self.num_ranks}, {self.memory!r})"


def open_context(
    transport: CollectiveTransport, communicator: Communicator, *, needs: Sequence[FamilyNeeds], timeout_s: float
) -> DeviceContext:
    """Make the window, and the kernels of the usual calls, on all ranks or on none.

    Args:
        transport: Row exchanges of the group, with an operation `OPEN_DEVICE`.
        communicator: NCCL's communicator of the ranks.
        needs: What each family of calls asks for.
        timeout_s: How long kernels wait for a rank.

    Raises:
        TopologyError: The ranks are not of one LSA team.
        TransportError: There is not enough memory, or another rank has no device backend.
        CompileError: A kernel does not compile.
        ConfigError: A part that is needed is not installed.

    Collective: yes.
    """
    num_gpu_ranks = count_gpu_ranks(transport, communicator.device)

    def make() -> DeviceContext:
        return DeviceContext(communicator, needs=needs, timeout_s=timeout_s, num_gpu_ranks=num_gpu_ranks)

    return open_together(transport, make)
