"""Owns the device backend as `PipelineBuffer` sees it: its windows, streams and failures, and how it is opened.

The protocol of a message is in `lanes`, the ways to a peer in `links`, the places in `layout` and `wiring`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from deep_ep_core.backend_choice import open_together
from deep_ep_core.copy_engine import copy_batch
from deep_ep_core.cuda_streams import RecordedEvent, current_stream
from deep_ep_core.errors import CommTimeoutError, TopologyError, TransportError
from deep_ep_core.nccl import Communicator
from deep_ep_core.stream_signals import StreamSignals
from deep_ep_core.window import SymmetricMemory
from deep_ep_pp.device.lanes import Lane
from deep_ep_pp.device.layout import SlotLayout, stamp_of
from deep_ep_pp.device.links import Part
from deep_ep_pp.device.network import GinNetwork
from deep_ep_pp.device.receipts import Receipt, Receipts
from deep_ep_pp.device.wiring import Wiring, slot_region, word_regions
from deep_ep_pp.ledger import Ledger
from deep_ep_pp.raw_bytes import as_bytes
from deep_ep_pp.sizing import PipelineConfig

__all__ = ["DeviceBackend", "open_device_backend"]

_POLL_S = 20e-6

# By peer: the stream of the last message, and the point right behind it there.
_Ends = dict[int, tuple[torch.cuda.Stream, RecordedEvent]]


class DeviceBackend:
    """Sends and receives by copy engines, in the caller's streams; the host waits for nothing.

    Args:
        ledger: The buffer's messages.
        communicator: NCCL's communicator of the ranks.

    Raises:
        TransportError: There is no memory, no registered window, or no network that is needed.
        CompileError: A kernel for the network does not compile.
        ConfigError: A part that is needed is not installed.

    Collective: the constructor and `configure` are.
    """

    name = "device"

    def __init__(self, ledger: Ledger, communicator: Communicator) -> None:
        device = communicator.device
        assert device.index is not None, "a communicator knows which device it is on"
        self._ledger = ledger
        self._communicator = communicator
        self._device = device
        self._device_idx: int = device.index
        self._rank, self._num_ranks = communicator.rank, communicator.num_ranks
        self._is_closed = False
        # Whether a stream may still wait for a peer, as far as the host knows.
        self._has_waits = False
        self._slots: SymmetricMemory | None = None
        self._network: GinNetwork | None = None
        self._lanes: dict[int, Lane] = {}
        self._receipts = Receipts(is_pinned=True)
        # The sends to a peer go one behind the other, and so do the receives from it.
        self._send_ends: _Ends = {}
        self._recv_ends: _Ends = {}
        with torch.cuda.device(device):
            self._own_stream = torch.cuda.Stream(device)
            self._words = SymmetricMemory(communicator, regions=word_regions(self._num_ranks), heap_bytes=0)
            if communicator.needs_gin:
                self._network = GinNetwork(communicator, self._words.window)
            # Last: what can fail on one rank alone must not leave the others in a collective step.
            self._signals = StreamSignals(device, rank=self._rank, timeout_s=ledger.wait_s, name=ledger.transport.name)

    def configure(self, config: PipelineConfig) -> None:
        """As `Backend.configure`. Stream: the host waits until messages that are on their way have been taken."""
        self._ledger.begin()
        self._check_waits()
        self._ledger.agree(config)
        # All that was sent is received by some stream; slots change once that is done, on all ranks. Sizes are compared
        # here. A step of its own: the next one is collective, and may return the slots in use.
        open_together(self._ledger.transport, self._flushed, must="have taken their messages")
        layout = SlotLayout.of(
            config, rank=self._rank, num_ranks=self._num_ranks, has_stage=self._communicator.needs_gin
        )
        old = self._slots
        with torch.cuda.device(self._device):
            slots = open_together(self._ledger.transport, lambda: self._fitting_slots(layout))
        self._slots = slots
        if self._network is not None:
            self._network.slots = slots.window
        wiring = Wiring(
            rank=self._rank,
            num_ranks=self._num_ranks,
            words=self._words,
            slots=slots,
            layout=layout,
            signals=self._signals,
            copy=copy_batch,
            network=self._network,
        )
        self._lanes = wiring.lanes(config.peers, self._ledger.num_sent)
        if old is not None and old is not slots:
            old.close()

    def send(self, tensors: Sequence[torch.Tensor], dst: int) -> None:
        """As `Backend.send`; the stream waits while the window is full."""
        self._begin()
        operation, number = self._ledger.next_send(dst), self._ledger.num_sent[dst] + 1
        with torch.cuda.device(self._device):
            try:
                stream = self._follow(self._send_ends, dst)
                # What lies elsewhere goes through this GPU's memory.
                staged = [tensor if self._is_here(tensor) else as_bytes(tensor).to(self._device) for tensor in tensors]
                self._lanes[dst].send(stream.cuda_stream, number, _parts(staged), operation=operation)
                self._send_ends[dst] = stream, RecordedEvent(stream)
            except CommTimeoutError as error:
                self._fail(error)
        self._ledger.num_sent[dst] = number

    def recv(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """As `Backend.recv`; the stream waits for the message, and the host too where a tensor is not on this GPU."""
        self._begin()
        operation, number = self._ledger.next_recv(src), self._ledger.num_received[src] + 1
        with torch.cuda.device(self._device):
            staged = [
                tensor if self._is_here(tensor) else torch.empty(tensor.nbytes, dtype=torch.uint8, device=self._device)
                for tensor in tensors
            ]
            try:
                stream = self._follow(self._recv_ends, src)
                receipt = self._receipts.make(operation, src, number, [tensor.nbytes for tensor in tensors])
                self._lanes[src].recv(stream.cuda_stream, _parts(staged), receipt)
                self._recv_ends[src] = stream, RecordedEvent(stream)
            except CommTimeoutError as error:
                self._fail(error)
        self._ledger.num_received[src] = number
        elsewhere = [(tensor, copy) for tensor, copy in zip(tensors, staged, strict=True) if tensor is not copy]
        if elsewhere:
            self._wait_on_host(lambda: receipt.is_done)
            self._receipts.let_go(receipt)
            self._check_receipt(receipt)
            for tensor, copy in elsewhere:
                as_bytes(tensor).copy_(copy)
        else:
            self._receipts.add(receipt)
        # Written past autograd, which must know.
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])

    def report_rejection(self, operation: str, reason: str) -> None:
        """As `Backend.report_rejection`."""
        self._ledger.report_rejection(operation, reason)

    def flush(self) -> None:
        """As `Backend.flush`; receives are waited for as well, since their sizes are compared here at the latest.

        After a failure, which was told already, there is nothing to wait for.
        """
        if self._ledger.has_failed:
            return
        # Sizes are compared last: messages that are right are to be taken, and credits given, whatever was received.
        self._ledger.begin()
        self._check_waits()
        stream = self._own_stream
        with torch.cuda.device(self._device):
            try:
                for dst, lane in self._lanes.items():
                    operation = f"the flush of messages to rank {dst}"
                    lane.wait_until_taken(stream.cuda_stream, self._ledger.num_sent[dst], operation=operation)
            except CommTimeoutError as error:
                self._fail(error)
            self._wait_on_host(stream.query)
            self._wait_on_host(lambda: not self._receipts.are_awaited)
            if self._network is not None:
                # Credits to ranks that go on must be out before the network goes.
                for _, end in self._recv_ends.values():
                    end.wait_on(stream)
                self._network.drain(stream.cuda_stream)
                self._wait_on_host(stream.query)
        self._has_waits = False
        self._check_next_receipt()

    def close(self) -> None:
        """As `Backend.close`. Streams that wait for a peer go on; what they were to receive is undefined."""
        if self._is_closed:
            return
        self._is_closed = True
        with torch.cuda.device(self._device):
            if self._has_waits:
                self._signals.abandon()
            self._signals.close()
            if self._network is not None:
                self._network.close()
            if self._slots is not None:
                self._slots.close()
            self._words.close()

    def _begin(self) -> None:
        """Look whether a call can be made, and tell what the device found out since the last one. No CUDA call."""
        self._ledger.begin()
        self._check_waits()
        self._check_next_receipt()

    def _flushed(self) -> contextlib.ExitStack:
        self.flush()
        # There is nothing to close.
        return contextlib.ExitStack()

    def _check_waits(self) -> None:
        try:
            self._signals.check()
        except CommTimeoutError as error:
            self._fail(error)

    def _check_next_receipt(self) -> None:
        receipt = self._receipts.next_wrong()
        if receipt is not None:
            self._check_receipt(receipt)

    def _check_receipt(self, receipt: Receipt) -> None:
        header = receipt.header
        if receipt.is_right or header is None:
            return
        # A wait that expired set the stream free, with a header that is none.
        self._check_waits()
        if header.stamp != stamp_of(receipt.number):
            self._ledger.fail(receipt.operation, receipt.src, _overwritten(receipt))
        remedy = "the message is lost, and what was received into is undefined; make both ranks agree"
        raise self._ledger.other_sizes(receipt.operation, header.sizes, receipt.given, remedy)

    def _wait_on_host(self, is_done: Callable[[], bool]) -> None:
        """Wait until something has happened in a stream; all waits there have deadlines."""
        while not is_done():
            self._check_waits()
            time.sleep(_POLL_S)
        # A stream that was set free is done, too.
        self._check_waits()

    def _fail(self, error: CommTimeoutError) -> NoReturn:
        """A wait has expired: find out who is late in the end."""
        self._ledger.fail(error.phase, error.peers[0], error)

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self._device

    def _follow(self, ends: _Ends, peer: int) -> torch.cuda.Stream:
        """The current stream, behind the message before: the counts in words must grow, whatever stream writes them."""
        stream = current_stream(self._device_idx)
        # Refuses a stream that a graph captures, before anything is enqueued.
        self._signals.check_usable(stream.cuda_stream)
        self._has_waits = True
        last = ends.get(peer)
        if last is not None and last[0] is not stream:
            # Not for what came on that stream since, which may wait for the message that is made now.
            last[1].wait_on(stream)
        return stream

    def _fitting_slots(self, layout: SlotLayout) -> SymmetricMemory:
        """The memory for a layout: that of the configuration before if it is large enough, on all ranks alike."""
        region = slot_region(layout)
        if self._slots is not None and self._slots.layout.num_bytes_of(region.name) >= region.num_bytes:
            return self._slots
        return SymmetricMemory(self._communicator, regions=[region], heap_bytes=0)


def open_device_backend(ledger: Ledger, communicator: Communicator, *, may_use_network: bool) -> DeviceBackend:
    """Make the device backend, on all ranks or on none.

    Args:
        ledger: The buffer's messages; its transport has an operation `OPEN_DEVICE`.
        communicator: NCCL's communicator of the ranks.
        may_use_network: Whether messages may go over the network.

    Raises:
        TopologyError: Some would, and may not.
        TransportError, CompileError, ConfigError: As `DeviceBackend`, or another rank has none.

    Collective: yes.
    """
    if communicator.needs_gin and not may_use_network:
        raise TopologyError(
            'messages between nodes go over the network with backend="device" only (got teams of '
            f"{communicator.lsa.num_ranks} of {communicator.num_ranks} ranks, on rank {communicator.rank}), since that "
            'part was never run on a network card; pass backend="device" to use it'
        )
    return open_together(ledger.transport, lambda: DeviceBackend(ledger, communicator))


def _parts(tensors: Sequence[torch.Tensor]) -> list[Part]:
    return [Part(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]


def _overwritten(receipt: Receipt) -> TransportError:
    return TransportError(
        f"message #{receipt.number} of rank {receipt.src} must stay in its slot until it is received (got another one "
        "there): its sender gave up waiting, and went on"
    )
