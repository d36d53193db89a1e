"""Owns the collective backend: messages over the point-to-point calls of any `torch.distributed` group, by the host.

A message is a header with the sizes of its tensors, and the bytes of each. It travels through host memory, since two
ranks that send to each other through one device queue would wait for each other.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from deep_ep_core.errors import CommTimeoutError, ConfigError, TransportError
from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_pp.checks import MAX_TENSORS
from deep_ep_pp.late_peer import LatePeers
from deep_ep_pp.sizing import PipelineConfig

__all__ = ["OPERATIONS", "PROTOCOL_VERSION", "CollectiveBackend"]

OPERATIONS = ("open", "pp_set_config")
"""What all ranks do together."""

PROTOCOL_VERSION = 1
"""Of the messages; the ranks of a buffer compare it when they make it."""

# Number of the message and of its tensors; then the size of each.
_NUM_FIXED_COLUMNS = 2
# The first of a range of tags, one a buffer: they keep buffers apart from each other, and from the user's messages.
_FIRST_TAG = 0x0DEF0000
_NUM_TAGS = 1 << 16

# Buffers are made in the same order on every rank, so a count per group gives each the same number everywhere.
_num_buffers: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


class _InFlight(NamedTuple):
    """A message that was sent and perhaps not asked for yet, with the memory that it is read from."""

    works: list[dist.Work]
    chunks: list[torch.Tensor]


class CollectiveBackend:
    """Sends and receives over the group of a transport.

    A send is complete when the receiver has asked for it: the group's backend (gloo) holds nothing back on its own, so
    counting sends that are not complete is the window, and waiting for the oldest is the back-pressure.

    Args:
        transport: The group's transport, for what all ranks do together.
    """

    name = "collective"

    def __init__(self, transport: CollectiveTransport) -> None:
        number = next(_num_buffers[transport.group.group_name])
        self._transport = transport
        self._tag = _FIRST_TAG + number % _NUM_TAGS
        store = _prefixed(transport.group.get_group_store(), f"deep_ep_pp/{number}")
        self._late_peers = LatePeers(
            store, rank=transport.rank, num_ranks=transport.num_ranks, timeout_s=transport.timeout_s
        )
        self._wire = _host_wire(transport, store)
        self._failure: CommTimeoutError | None = None
        self._window = 0
        self._num_sent = [0] * transport.num_ranks
        self._num_received = [0] * transport.num_ranks
        self._in_flight: dict[int, deque[_InFlight]] = {}
        # Headers of messages whose tensors this rank has refused to receive so far, by source.
        self._headers: dict[int, list[int]] = {}

    def configure(self, config: PipelineConfig) -> None:
        """As `Backend.configure`."""
        self._begin()
        transport = self._transport
        try:
            operation = transport.begin(
                "pp_set_config",
                [
                    AgreedField(name="num_max_tensor_bytes", value=config.num_max_tensor_bytes),
                    AgreedField(name="num_max_inflight_tensors", value=config.num_max_inflight_tensors),
                ],
            )
            # All ranks see the counts of all, so that all come to the same result.
            ones = [1] * transport.num_ranks
            mine = torch.tensor([self._num_sent + self._num_received] * transport.num_ranks)
            counts = operation.exchange_rows(mine, ones, ones, "message counts")
        except CommTimeoutError as error:
            self._failure = error
            self._late_peers.report_failure("pp_set_config", error.peers[0])
            raise
        sent, received = counts.split(transport.num_ranks, dim=1)
        undelivered = (sent - received.T).nonzero().tolist()
        if undelivered:
            src, dst = undelivered[0]
            raise ConfigError(
                f"every message must be received before pp_set_config (got {sent[src, dst]} sent by rank {src} to rank "
                f"{dst}, which received {received[dst, src]}; seen on rank {transport.rank}); nothing was changed, "
                "receive them and call again"
            )
        # Receivers ask before they count, so this waits for nobody.
        self.flush()
        self._window = config.num_max_inflight_tensors

    def send(self, tensors: Sequence[torch.Tensor], dst: int) -> None:
        """As `Backend.send`; the host waits while the window is full."""
        deadline = self._begin()
        operation = f"pp_send #{self._num_sent[dst] + 1} to rank {dst}"
        in_flight = self._in_flight.setdefault(dst, deque())
        while len(in_flight) >= self._window:
            self._wait(in_flight[0].works, deadline, operation, dst)
            in_flight.popleft()
        header = torch.zeros(_NUM_FIXED_COLUMNS + MAX_TENSORS, dtype=torch.int64)
        fields = [self._num_sent[dst] + 1, len(tensors), *(tensor.nbytes for tensor in tensors)]
        header[: len(fields)] = torch.tensor(fields)
        # Copies, since the caller may overwrite his tensors as soon as this call is over.
        chunks = [header, *(_as_bytes(tensor).to("cpu", copy=True) for tensor in tensors)]
        try:
            works = [self._wire.send([chunk], dst, self._tag) for chunk in chunks if chunk.numel()]
        except RuntimeError as error:
            self._fail(operation, dst, error)
        in_flight.append(_InFlight(works, chunks))
        self._num_sent[dst] += 1

    def recv(self, tensors: Sequence[torch.Tensor], src: int) -> None:
        """As `Backend.recv`; the host waits for the message."""
        deadline = self._begin()
        operation = f"pp_recv #{self._num_received[src] + 1} from rank {src}"
        if src not in self._headers:
            header = torch.empty(_NUM_FIXED_COLUMNS + MAX_TENSORS, dtype=torch.int64)
            self._recv_chunks([header], src, deadline, operation)
            self._headers[src] = header.tolist()
        message_idx, num_tensors, *sizes = self._headers[src]
        assert message_idx == self._num_received[src] + 1, (operation, self._headers[src])
        given = [tensor.nbytes for tensor in tensors]
        if given != sizes[:num_tensors]:
            # The message stays, so the right call can still be made.
            raise rejected(
                self._transport.rank,
                f"{operation} must be given tensors of the message's sizes, {sizes[:num_tensors]} bytes",
                given,
                "nothing was received, make both ranks agree and call again",
            )
        views = [_as_bytes(tensor) for tensor in tensors]
        chunks = [view if view.device.type == "cpu" else torch.empty_like(view, device="cpu") for view in views]
        self._recv_chunks(chunks, src, deadline, operation)
        for view, chunk in zip(views, chunks, strict=True):
            if view is not chunk:
                view.copy_(chunk)
        del self._headers[src]
        self._num_received[src] += 1

    def report_rejection(self, operation: str, reason: str) -> None:
        """As `Backend.report_rejection`."""
        if self._failure is None:
            self._late_peers.report_rejection(operation, reason)
            if operation == "pp_set_config":
                self._transport.report_rejection(operation, reason)

    def flush(self) -> None:
        """As `Backend.flush`; after a failure, which was told already, there is nothing to wait for."""
        if self._failure is not None:
            return
        deadline = self._begin()
        for dst, in_flight in self._in_flight.items():
            while in_flight:
                self._wait(in_flight[0].works, deadline, f"the flush of messages to rank {dst}", dst)
                in_flight.popleft()

    def close(self) -> None:
        """As `Backend.close`; what is on its way is dropped."""
        self._in_flight.clear()

    def _begin(self) -> float:
        """Look whether a call can be made; returns its deadline."""
        if self._failure is not None:
            raise TransportError(
                f"{self._transport.name} cannot be used on rank {self._transport.rank} after a failed operation "
                f"({self._failure}); make a new process group and a new buffer"
            ) from self._failure
        self._late_peers.withdraw_rejection()
        return time.monotonic() + self._transport.timeout_s - self._late_peers.search_s

    def _recv_chunks(self, chunks: Sequence[torch.Tensor], src: int, deadline: float, operation: str) -> None:
        try:
            works = [self._wire.recv([chunk], src, self._tag) for chunk in chunks if chunk.numel()]
        except RuntimeError as error:
            self._fail(operation, src, error)
        self._wait(works, deadline, operation, src)

    def _wait(self, works: Sequence[dist.Work], deadline: float, operation: str, peer: int) -> None:
        try:
            for work in works:
                # 1 ms at least: a zero would mean "no timeout".
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
        except (RuntimeError, TimeoutError) as error:
            # On the host the backend has no error of its own for a late or lost peer.
            self._fail(operation, peer, error)

    def _fail(self, operation: str, peer: int, cause: BaseException) -> NoReturn:
        self._failure = self._late_peers.failure(operation, peer, cause)
        # For peers that wait for this rank together with all others.
        self._transport.report_rejection(operation, f"{operation} failed: {self._failure}")
        raise self._failure from cause


def _prefixed(store: Any, prefix: str) -> Any:
    """A space of its own in a store."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # public, but not in __all__


def _host_wire(transport: CollectiveTransport, store: Any) -> Any:
    """What sends host memory between the ranks: the group itself, or, where it serves GPUs only, a gloo group of it."""
    if "cpu:" in dist.get_backend_config(transport.group):
        return transport.group
    timeout = timedelta(seconds=transport.timeout_s)
    return dist.ProcessGroupGloo(_prefixed(store, "gloo"), transport.rank, transport.num_ranks, timeout)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as `[nbytes]` of uint8, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)
