"""Owns the collective backend: a table whose entries are moved by messages of any `torch.distributed` group.

Owners take part in a fetch: they are told which of their entries are wanted, and send these at once. So a hook waits
for messages only, and never for what another rank does next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from deep_ep_core.backend_choice import OPEN_DEVICE
from deep_ep_core.errors import CommTimeoutError, TransportError
from deep_ep_core.stream import EventHandle
from deep_ep_core.transport import CollectiveTransport
from deep_ep_engram.backend import Fetched
from deep_ep_engram.checks import FetchArgs, TableShape, WriteArgs, check_range
from deep_ep_engram.messages import PendingMessages, wire_device
from deep_ep_engram.scales import gather_scales
from deep_ep_engram.writing import agree_on_write

__all__ = ["FINISH_WRITE", "OPERATIONS", "CollectiveBackend"]

FINISH_WRITE = "the end of engram_write"
"""The operation by which ranks of the device backend know that all entries are in place."""

OPERATIONS = ("open", OPEN_DEVICE, "engram_write", FINISH_WRITE, "engram_fetch")
"""What the transport of a table must know."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """This rank's part of the table: `words` are its entries as `_as_words` gives them."""

    shape: TableShape
    words: torch.Tensor
    starts: torch.Tensor
    sf: torch.Tensor | None


class CollectiveBackend:
    """Keeps the entries in torch's memory and moves them with point-to-point messages.

    Args:
        transport: The group's transport; its operations are `OPERATIONS`.
        is_in_host_memory: Keep the entries in host memory, whatever device they come from.
    """

    name = "collective"

    def __init__(self, transport: CollectiveTransport, *, is_in_host_memory: bool) -> None:
        self._transport = transport
        self._is_in_host_memory = is_in_host_memory
        self._table: _Table | None = None
        # Also keeps messages alive whose hook the caller dropped.
        self._under_way: list[_FetchUnderWay] = []
        self._failure: CommTimeoutError | None = None

    def write(self, args: WriteArgs) -> TableShape:
        """Replace the table, once all ranks agree on it."""
        self._check_usable()
        storage = args.storage
        shape = agree_on_write(self._transport, args)
        memory = torch.device("cpu") if self._is_in_host_memory else storage.device
        self._table = _Table(
            shape=shape,
            words=_as_words(storage.to(memory, copy=True)),
            starts=torch.tensor(shape.starts, device=storage.device),
            sf=args.sf,
        )
        return shape

    def fetch(self, args: FetchArgs) -> _FetchUnderWay:
        """Ask the owners for each distinct entry once, and send what this rank is asked for.

        Raises:
            ConfigError: An index is out of range; nothing was sent. On CUDA the host waits for the indices.
        """
        self._check_usable()
        assert self._table is not None, "the checks refuse a fetch before a write"
        table, transport = self._table, self._transport
        me, device = transport.rank, table.shape.device
        check_range(me, table.shape.num_entries, args.indices)
        # Sorted, so the entries of each owner are consecutive.
        distinct, place = args.indices.reshape(-1).long().unique(return_inverse=True)
        num_wanted = torch.searchsorted(distinct, table.starts).diff()
        local_idx = distinct - table.starts[:-1].repeat_interleave(num_wanted)
        num_wanted_of = num_wanted.tolist()
        operation = transport.begin("engram_fetch", [], [[num] for num in num_wanted_of])
        num_asked_by = [values[0] for values in operation.peer_values]
        asked = operation.exchange_rows(local_idx, num_wanted_of, num_asked_by, "indices").to(table.words.device)
        # Entries that are here already are copied, also out of the reach of a later write.
        asked_by_me = asked.split(num_asked_by)[me]
        end = sum(num_asked_by[: me + 1])
        asked_by_others = torch.cat([asked[: end - len(asked_by_me)], asked[end:]])
        num_asked_by[me] = 0
        wire = wire_device(transport.group, device)
        served = table.words.index_select(0, asked_by_others).to(wire)
        rows = served.new_empty((len(distinct), served.size(1)))
        chunks = rows.split(num_wanted_of)
        chunks[me].copy_(table.words.index_select(0, asked_by_me))
        sf = None
        if table.sf is not None:
            sf = gather_scales(table.sf, args.indices, is_col_major=args.use_tma_aligned_col_major_sf)
        phase = f"EngramTable: {operation.name}: entries"
        with self._failure_noted():
            messages = PendingMessages(transport.group, sends=served.split(num_asked_by), recvs=chunks, phase=phase)
        fetch = _FetchUnderWay(
            self,
            messages,
            rows=rows,
            place=place,
            sf=sf,
            event=EventHandle(device),
            shape=(args.indices.size(0), args.indices.size(1) * table.shape.hidden),
            dtype=table.shape.dtype,
        )
        self._under_way.append(fetch)
        return fetch

    def complete(self, fetch: _FetchUnderWay) -> None:
        """Wait for the messages of a fetch, on behalf of its hook."""
        with self._failure_noted():
            fetch.messages.wait(self._transport.timeout_s)
        self._under_way.remove(fetch)

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation."""
        self._transport.report_rejection(operation, reason)

    def close(self) -> None:
        """Complete the fetches under way, whose hooks stay valid, and release the table."""
        # After a failure the messages may never arrive, and their hooks say so.
        while self._under_way and self._failure is None:
            self._under_way[0].complete()
        self._table = None

    @contextlib.contextmanager
    def _failure_noted(self) -> Iterator[None]:
        """Remember that messages may be missing for good, and tell peers that will wait for this rank why."""
        try:
            yield
        except CommTimeoutError as error:
            self._failure = self._failure or error
            self._transport.report_rejection("engram_fetch", str(error))
            raise

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise TransportError(
                f"EngramTable cannot be used on rank {self._transport.rank} after a failed operation "
                f"({self._failure}); make a new process group and a new table"
            ) from self._failure


class _FetchUnderWay:
    """The hook of one fetch.

    Args:
        backend: Where it was begun.
        messages: What brings the entries of others.
        rows: `[num_distinct, num_words]`: where they are received.
        place: The row of each index of the call.
        sf: What the call returns for the scales.
        event: What was put on the stream of the call.
        shape: Shape of the result.
        dtype: Its dtype.
    """

    def __init__(
        self,
        backend: CollectiveBackend,
        messages: PendingMessages,
        *,
        rows: torch.Tensor,
        place: torch.Tensor,
        sf: torch.Tensor | None,
        event: EventHandle,
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        self._backend = backend
        self.messages = messages
        self._rows, self._place, self._sf = rows, place, sf
        self._event = event
        self._shape, self._dtype = shape, dtype
        self._is_complete = False
        self._fetched: Fetched | None = None

    def complete(self) -> None:
        """Wait until all entries have arrived."""
        if not self._is_complete:
            self._backend.complete(self)
            self._is_complete = True

    @torch.no_grad()
    def __call__(self) -> Fetched:
        """Wait, and lay the entries out."""
        if self._fetched is None:
            self.complete()
            self._event.current_stream_wait()
            device = self._place.device
            if device.type == "cuda":
                # The stream of the hook may be another than that of the call, which the memory comes from.
                for tensor in (self._rows, self._place, self._sf):
                    if tensor is not None and tensor.is_cuda:
                        tensor.record_stream(torch.cuda.current_stream(device))
            rows = self._rows.to(device).index_select(0, self._place).view(self._dtype)
            self._fetched = Fetched(rows.view(self._shape), self._sf)
        return self._fetched


def _as_words(rows: torch.Tensor) -> torch.Tensor:
    """The rows in the widest words that fit: torch cannot index FP8, and wide elements are copied faster."""
    row_bytes = rows.size(1) * rows.element_size()
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    word = next(dtype for dtype in words if row_bytes % dtype.itemsize == 0)
    return rows.view(torch.uint8).view(word)
