"""Owns the collective backend: messages over the point-to-point calls of any `torch.distributed` group, by the host.

A message is a header with the sizes of its tensors, and the bytes of each. It travels through host memory, since two
ranks that send to each other through one device queue would wait for each other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deep_ep_pp.checks import MAX_TENSORS
from deep_ep_pp.ledger import Ledger, prefixed
from deep_ep_pp.raw_bytes import as_bytes
from deep_ep_pp.sizing import PipelineConfig

__all__ = ["PROTOCOL_VERSION", "CollectiveBackend"]

PROTOCOL_VERSION = 1
"""Of the messages; the ranks of a buffer compare it when they make it."""

# Number of the message and of its tensors; then the size of each.
_NUM_FIXED_COLUMNS = 2
# The first of a range of tags, one a buffer: they keep buffers apart from each other, and from the user's messages.
_FIRST_TAG = 0x0DEF0000
_NUM_TAGS = 1 << 16


class _InFlight(NamedTuple):
    """A message that was sent and perhaps not asked for yet, with the memory that it is read from."""

    works: list[dist.Work]
    chunks: list[torch.Tensor]


class CollectiveBackend:
    """Sends and receives over the group of a transport.

    A send is complete when the receiver has asked for it: the group's backend (gloo) holds nothing back on its own, so
    counting sends that are not complete is the window, and waiting for the oldest is the back-pressure.

    Args:
        ledger: The buffer's messages; its transport has the group.
    """

    name = "collective"

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._tag = _FIRST_TAG + ledger.number % _NUM_TAGS
        self._wire = _host_wire(ledger)
        self._window = 0
        self._in_flight: dict[int, deque[_InFlight]] = {}
        # Headers of messages whose tensors this rank has refused to receive so far, by source.
        self._headers: dict[int, list[int]] = {}

    def configure(self, config: PipelineConfig) -> None:
        """As `Backend.configure`."""
        self._ledger.begin()
        self._ledger.agree(config)
        # Receivers ask before they count, so this waits for nobody.
        self.flush()
        self._window = config.num_max_inflight_tensors

    def send(self, tensors: Sequence[torch.Tensor], dst: int) -> None:
        """As `Backend.send`; the host waits while the window is full."""
        ledger = self._ledger
        deadline = ledger.begin()
        operation = ledger.next_send(dst)
        in_flight = self._in_flight.setdefault(dst, deque())
        while len(in_flight) >= self._window:
            self._wait(in_flight[0].works, deadline, operation, dst)
            in_flight.popleft()
        header = torch.zeros(_NUM_FIXED_COLUMNS + MAX_TENSORS, dtype=torch.int64, device="cpu")
        fields = [ledger.num_sent[dst] + 1, len(tensors), *(tensor.nbytes for tensor in tensors)]
        header[: len(fields)] = torch.tensor(fields, device="cpu")
        # Copies, since the caller may overwrite his tensors as soon as this call is over.
        chunks = [header, *(as_bytes(tensor).to("cpu", copy=True) for tensor in tensors)]
        try:
            works = [self._wire.send([chunk], dst, self._tag) for chunk in chunks if chunk.numel()]
        except RuntimeError as error:
            ledger.fail(operation, dst, error)
        in_flight.append(_InFlight(works, chunks))
        ledger.num_sent[dst] += 1

    def recv(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """As `Backend.recv`; the host waits for the message."""
        ledger = self._ledger
        deadline = ledger.begin()
        operation = ledger.next_recv(src)
        if src not in self._headers:
            header = torch.empty(_NUM_FIXED_COLUMNS + MAX_TENSORS, dtype=torch.int64, device="cpu")
            self._recv_chunks([header], src, deadline, operation)
            self._headers[src] = header.tolist()
        message_idx, num_tensors, *sizes = self._headers[src]
        assert message_idx == ledger.num_received[src] + 1, (operation, self._headers[src])
        given = [tensor.nbytes for tensor in tensors]
        if given != sizes[:num_tensors]:
            # The message stays, so the right call can still be made.
            remedy = "nothing was received, make both ranks agree and call again"
            raise ledger.other_sizes(operation, sizes[:num_tensors], given, remedy)
        views = [as_bytes(tensor) for tensor in tensors]
        chunks = [view if view.device.type == "cpu" else torch.empty_like(view, device="cpu") for view in views]
        self._recv_chunks(chunks, src, deadline, operation)
        for view, chunk in zip(views, chunks, strict=True):
            if view is not chunk:
                view.copy_(chunk)
        del self._headers[src]
        ledger.num_received[src] += 1

    def report_rejection(self, operation: str, reason: str) -> None:
        """As `Backend.report_rejection`."""
        self._ledger.report_rejection(operation, reason)

    def flush(self) -> None:
        """As `Backend.flush`; after a failure, which was told already, there is nothing to wait for."""
        if self._ledger.has_failed:
            return
        deadline = self._ledger.begin()
        for dst, in_flight in self._in_flight.items():
            while in_flight:
                self._wait(in_flight[0].works, deadline, f"the flush of messages to rank {dst}", dst)
                in_flight.popleft()

    def close(self) -> None:
        """As `Backend.close`; what is on its way is dropped."""
        self._in_flight.clear()

    def _recv_chunks(self, chunks: Sequence[torch.Tensor], src: int, deadline: float, operation: str) -> None:
        try:
            works = [self._wire.recv([chunk], src, self._tag) for chunk in chunks if chunk.numel()]
        except RuntimeError as error:
            self._ledger.fail(operation, src, error)
        self._wait(works, deadline, operation, src)

    def _wait(self, works: Sequence[dist.Work], deadline: float, operation: str, peer: int) -> None:
        try:
            for work in works:
                # 1 ms at least: a zero would mean "no timeout".
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
        except (RuntimeError, TimeoutError) as error:
            # On the host the backend has no error of its own for a late or lost peer.
            self._ledger.fail(operation, peer, error)


def _host_wire(ledger: Ledger) -> Any:
    """What sends host memory between the ranks: the group itself, or, where it serves GPUs only, a gloo group of it."""
    transport = ledger.transport
    if "cpu:" in dist.get_backend_config(transport.group):
        return transport.group
    timeout = timedelta(seconds=transport.timeout_s)
    return dist.ProcessGroupGloo(prefixed(ledger.store, "gloo"), transport.rank, transport.num_ranks, timeout)
