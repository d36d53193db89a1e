"""Owns the device backend as `ContextBuffer` sees it: which bytes each call copies where, and how it is opened."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deep_ep_core.backend_choice import open_together
from deep_ep_core.copy_engine import Copy, copy_batch
from deep_ep_core.cuda_streams import RecordedEvent, current_stream
from deep_ep_core.nccl import Communicator
from deep_ep_core.stream import comm_stream
from deep_ep_core.stream_signals import StreamSignals
from deep_ep_core.transport import CollectiveTransport
from deep_ep_cp.agreed import END_SESSION, SET_CONFIG, agreed_by_config
from deep_ep_cp.backend import SessionCall
from deep_ep_cp.device.meetings import Meetings
from deep_ep_cp.device.memory import ContextMemory
from deep_ep_cp.reduction import sum_in_rank_order
from deep_ep_cp.region import Region
from deep_ep_cp.session import SessionConfig

__all__ = ["DeviceBackend", "open_device_backend"]


class DeviceBackend:
    """Writes slots into the windows of all ranks by copy engines, and lets the ranks' streams meet.

    Args:
        memory: The window.
        signals: Between the streams of the ranks.
        transport: Compares configurations, and finds the words for ranks that disagree.
    """

    name = "device"

    def __init__(self, memory: ContextMemory, signals: StreamSignals, transport: CollectiveTransport) -> None:
        self.memory = memory.data
        self._memory = memory
        self._signals = signals
        self._transport = transport
        self._meetings = Meetings(memory, signals, transport)
        rank, num_ranks = memory.rank, memory.num_ranks
        # Each rank begins with another peer, so that they do not all write to one. Its own slot needs no link.
        self._targets = [(rank + step) % num_ranks for step in range(1, num_ranks + 1)]

    def set_config(self, config: SessionConfig) -> None:
        """Compare the configuration with that of the other ranks."""
        self.check()
        self._transport.begin(SET_CONFIG, agreed_by_config(config))

    def check(self) -> None:
        """Raise if a rank did not come in time, came with another call, or a graph captures the current stream."""
        self._meetings.check(current_stream(self._memory.device_idx))

    def all_gather(self, call: SessionCall) -> None:
        """Write this rank's tensors to its slots at every rank."""
        rank = self._memory.rank
        copies = [
            Copy(self._slot_address(region, at=target, of=rank), tensor.data_ptr(), region.slot_bytes)
            for tensor, region, is_in_place in zip(call.tensors, call.regions, call.is_in_place, strict=True)
            for target in self._targets
            if not (is_in_place and target == rank)
        ]
        self._move("all_gather", call, copies)

    def reduce_scatter(self, call: SessionCall) -> list[torch.Tensor]:
        """Write the addend of each rank to this rank's slot there, and sum what came here."""
        rank = self._memory.rank
        copies = [
            Copy(
                self._slot_address(region, at=target, of=rank),
                tensor.data_ptr() + target * region.slot_bytes,
                region.slot_bytes,
            )
            for tensor, region in zip(call.tensors, call.regions, strict=True)
            for target in self._targets
        ]
        self._move("reduce_scatter", call, copies)
        return [sum_in_rank_order(region.view(self.memory)) for region in call.regions]

    def end_session(self, session_idx: int) -> None:
        """Meet once more, behind the current stream: what comes after may be written where this session lay."""
        self.check()
        current, comm = current_stream(self._memory.device_idx), comm_stream(self._memory.device)
        assert isinstance(comm, torch.cuda.Stream), "the memory is on a CUDA device"
        # Events are made for the device that is current, which need not be the buffer's.
        with torch.cuda.device(self._memory.device):
            if current != comm:
                # The current stream may write in-place tensors of the next session, where bytes of this one still
                # arrive if the handle of their call was not called.
                RecordedEvent(comm).wait_on(current)
                RecordedEvent(current).wait_on(comm)
            self._meetings.meet(comm, END_SESSION, session_idx, ())

    def report_rejection(self, call: str, reason: str) -> None:
        """Leave word for peers that wait on the host; those whose streams wait name this rank without its reason."""
        self._transport.report_rejection(call, reason)

    def abandon(self) -> None:
        """Set this rank's streams free from their waits; what they were to receive is undefined."""
        self._signals.abandon()

    def close(self) -> None:
        """Let go of the window, once this rank's streams are through their waits; not collective, may be repeated."""
        self._signals.close()
        self._memory.close()

    def _move(self, operation: str, call: SessionCall, copies: Sequence[Copy]) -> None:
        stream = current_stream(self._memory.device_idx)
        copy_batch(stream.cuda_stream, copies)
        self._meetings.meet(stream, operation, call.session_idx, call.regions)

    def _slot_address(self, region: Region, *, at: int, of: int) -> int:
        return self._memory.data_addresses[at] + region.offset + of * region.slot_bytes


def open_device_backend(
    transport: CollectiveTransport, communicator: Communicator, *, num_bytes: int, timeout_s: float
) -> DeviceBackend:
    """Make the window and the signals on all ranks, or on none.

    Args:
        transport: Row exchanges of the group, with the operations of `agreed`.
        communicator: NCCL's communicator of the ranks.
        num_bytes: Size of the regions' memory.
        timeout_s: How long a stream waits for a rank.

    Raises:
        TopologyError: The ranks are not of one LSA team.
        TransportError: There is not enough memory, the device has no signals, or another rank failed.
        ConfigError: A part that is needed is not installed.

    Collective: yes.
    """

    def make() -> DeviceBackend:
        memory = ContextMemory(communicator, num_bytes=num_bytes)
        try:
            signals = StreamSignals(memory.device, rank=memory.rank, timeout_s=timeout_s, name=transport.name)
            return DeviceBackend(memory, signals, transport)
        except BaseException:
            memory.close()
            raise

    return open_together(transport, make)
