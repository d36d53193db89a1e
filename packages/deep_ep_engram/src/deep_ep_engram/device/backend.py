"""Owns the device backend as `EngramTable` sees it: the order of writes and fetches, and how the backend is opened."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.backend_choice import Closable, count_gpu_ranks, open_together
from deep_ep_core.errors import ConfigError, TopologyError, TransportError
from deep_ep_core.nccl import Communicator
from deep_ep_core.refusals import rejected
from deep_ep_core.stream import CommScope, EventHandle, StreamOptions
from deep_ep_core.transport import CollectiveTransport
from deep_ep_engram.backend import Fetched, FetchHook
from deep_ep_engram.checks import FetchArgs, TableShape, WriteArgs
from deep_ep_engram.collective import FINISH_WRITE, CollectiveBackend
from deep_ep_engram.device.fetcher import FetchRequest, RowFetcher
from deep_ep_engram.device.host_memory import open_host_storage
from deep_ep_engram.device.leaving import SharedLife, let_go_of_the_left
from deep_ep_engram.device.network import Gets, Network
from deep_ep_engram.device.storage import EntryStorage, WindowStorage
from deep_ep_engram.scales import empty_scales
from deep_ep_engram.writing import agree_on_write

__all__ = ["DeviceBackend", "open_device"]

_ASYNC = StreamOptions(async_with_compute_stream=True)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Table:
    """What was written last."""

    shape: TableShape
    sf: torch.Tensor | None


class DeviceBackend:
    """Fetches entries by CUDA kernels, without help of their owners; leaves tables of CPU tensors to the other backend.

    Args:
        transport: The group's transport.
        collective: The backend for tables that are written from the CPU.
        storage: Memory for the entries.
        fetcher: What copies rows.
        network: What brings entries that no load reaches; None where there are none.
        device: Device of this rank.
    """

    name = "device"

    def __init__(
        self,
        transport: CollectiveTransport,
        collective: CollectiveBackend,
        *,
        storage: EntryStorage,
        fetcher: RowFetcher,
        network: Network | None,
        device: torch.device,
    ) -> None:
        self._transport = transport
        self._collective = collective
        self._storage = storage
        self._fetcher = fetcher
        self._network = network
        self._device = device
        # None: no table, or one of the collective backend.
        self._table: _Table | None = None
        # From the first entry that a write changes until all ranks have changed theirs.
        self._is_half_written = False
        # Where other ranks read this one's memory through its network; see `open_device`.
        self.life: SharedLife | None = None
        self._num_fetches = 0
        # Fetches that wait for the network, the oldest first.
        self._under_way: list[_DeviceFetch] = []
        # What a write has found about earlier fetches, for the next fetch, hook or `close` to raise.
        self._unsaid: ConfigError | None = None
        self._is_closed = False

    @property
    def has_network(self) -> bool:
        """Whether entries of some ranks come over the network."""
        return self._network is not None

    def write(self, args: WriteArgs) -> TableShape:
        """Replace the table, once all ranks agree on it and none of them fetches."""
        if args.storage.device.type != "cuda":
            shape = self._collective.write(args)
            self._table = None
            return shape
        self._check_write(args.storage)
        row_bytes = args.storage.size(1) * args.storage.element_size()
        self._fetcher.prepare(row_bytes)
        try:
            self._finish_fetches()
        except ConfigError as error:
            # Of fetches of this rank alone, and peers must not wait for it: the next fetch, hook or `close` tells. Kept
            # without its frames, which hold the entries of `args`.
            self._unsaid = error.with_traceback(None)
        # Whoever is here has finished its fetches, so behind it no one reads the table.
        shape = agree_on_write(self._transport, args)
        self._is_half_written = True
        self._fetcher.set_starts(shape.starts)
        self._storage.fill(args.storage)
        if self._network is not None:
            self._network.set_entries(args.storage.nbytes)
        torch.cuda.current_stream(self._device).synchronize()
        # And behind this one all entries are in place.
        self._transport.begin(FINISH_WRITE, [])
        self._is_half_written = False
        self._table = _Table(shape=shape, sf=args.sf)
        return shape

    def fetch(self, args: FetchArgs) -> FetchHook:
        """Begin to bring the entries of `args.indices`; not collective."""
        if self._is_half_written:
            raise TransportError(
                f"EngramTable cannot be used on rank {self._transport.rank} after a failed operation (an engram_write "
                "that not all ranks have ended); make a new process group and a new table"
            )
        if self._table is None:
            return self._collective.fetch(args)
        self.check()
        if self._network is not None and torch.cuda.is_current_stream_capturing():
            raise rejected(
                self._transport.rank,
                "a fetch can be captured in a CUDA graph where loads reach all entries",
                "a table with entries in other nodes",
                "fetch outside of the graph",
            )
        shape, indices, sf = self._table.shape, args.indices, self._table.sf
        num_tokens, num_each = indices.shape
        self._num_fetches += 1
        with CommScope(self._device, _ASYNC) as scope:
            data = torch.empty((num_tokens, num_each * shape.hidden), dtype=shape.dtype, device=self._device)
            out_sf = None
            if sf is not None:
                out_sf = empty_scales(sf, num_tokens, num_each, is_col_major=args.use_tma_aligned_col_major_sf)
            request = FetchRequest(
                indices=indices,
                data=data,
                row_bytes=shape.row_bytes,
                sf=sf,
                out_sf=out_sf,
                fetch_idx=self._num_fetches,
            )
            gets: Gets | None = None
            if request.num_rows:
                if self._network is not None:
                    gets = self._ask(self._network, request, args.num_qps, scope.stream_handle)
                self._fetcher.launch(request, scope.stream_handle)
            event = scope.finish((indices, sf), (data, out_sf)).event
            assert event is not None, "the operation is asynchronous"
        fetch = _DeviceFetch(self, request, gets, event)
        if gets is not None:
            self._under_way.append(fetch)
        return fetch

    def complete(self, request: FetchRequest, gets: Gets) -> None:
        """Bring what was asked for over the network to its place, on the current stream."""
        assert self._network is not None, "something was asked for"
        # The handle of the default stream names that of the current device.
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            self._network.wait(gets, stream.cuda_stream)
            self._fetcher.launch(request, stream.cuda_stream, gets.staged)
            gets.record_stream(stream)
        self._under_way = [fetch for fetch in self._under_way if fetch.request is not request]

    def check(self) -> None:
        """Raise what a kernel has reported, and has not been raised.

        Raises:
            ConfigError: An index was out of range.
            CommTimeoutError: Entries did not come in time; again at every call.
        """
        if self._network is not None:
            self._network.check()
        unsaid, self._unsaid = self._unsaid, None
        if unsaid is not None:
            raise unsaid
        self._fetcher.check()

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation; a fetch that needs no peer is no one's affair."""
        if self._table is None or operation != "engram_fetch":
            self._transport.report_rejection(operation, reason)

    def close(self) -> None:
        """Complete the fetches under way, whose hooks stay valid, and release the table; may be called again."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._finish_fetches()
        finally:
            self._table = None
            parts: list[Closable] = [self._storage] if self._network is None else [self._network, self._storage]
            if self.life is not None:
                self.life.leave(parts)
            else:
                for part in parts:
                    part.close()
            self._collective.close()

    def _check_write(self, storage: torch.Tensor) -> None:
        if storage.device != self._device:
            raise rejected(
                self._transport.rank,
                f"storage must be on {self._device}, the device of the table on this rank",
                str(storage.device),
                "move it, or make the table after torch.cuda.set_device",
            )
        if torch.cuda.is_current_stream_capturing():
            raise rejected(
                self._transport.rank,
                "engram_write must be called outside of a CUDA graph",
                "a stream that is captured",
                "write before the capture; a graph fetches what is in the table when it is replayed",
            )

    def _finish_fetches(self) -> None:
        """Wait on the host for all fetches of this rank, those of graphs included; raise what they report."""
        for fetch in list(self._under_way):
            fetch.complete()
        torch.cuda.synchronize(self._device)
        self.check()

    def _ask(self, network: Network, request: FetchRequest, num_qps: int, stream: int) -> Gets:
        """Ask for entries. Where the stage is full, older fetches are completed first, in this stream."""
        while True:
            gets = network.try_ask(request, num_qps or network.num_contexts, stream)
            if gets is not None:
                return gets
            assert self._under_way, "the checks refuse a fetch that is too large for an empty stage"
            self._under_way[0].complete()


class _DeviceFetch:
    """The hook of one fetch.

    Args:
        backend: Where it was begun.
        request: What it wants.
        gets: What it has asked for over the network, or None.
        event: Behind what was put on the communication stream.
    """

    def __init__(self, backend: DeviceBackend, request: FetchRequest, gets: Gets | None, event: EventHandle) -> None:
        self.request = request
        self._backend = backend
        self._gets = gets
        self._event = event

    def complete(self) -> None:
        """Put what is left to do for the network's entries on the current stream, once."""
        gets = self._gets
        if gets is None:
            return
        self._event.current_stream_wait()
        self._backend.complete(self.request, gets)
        # Not before: where that raises, the entries are still to come.
        self._gets = None
        _record(self.request)
        self._event = EventHandle(self.request.data.device)

    @torch.no_grad()
    def __call__(self) -> Fetched:
        """Let the current stream wait, and return the results."""
        self.complete()
        self._event.current_stream_wait()
        _record(self.request)
        self._backend.check()
        return Fetched(self.request.data, self.request.out_sf)


def _record(request: FetchRequest) -> None:
    """Let torch know that the current stream uses the tensors of a fetch."""
    stream = torch.cuda.current_stream(request.data.device)
    for tensor in (request.indices, request.data, request.out_sf):
        if tensor is not None:
            tensor.record_stream(stream)


def open_device(
    transport: CollectiveTransport,
    communicator: Communicator,
    collective: CollectiveBackend,
    *,
    num_bytes: int,
    num_cpu_bytes: int,
    timeout_s: float,
    may_use_network: bool,
) -> DeviceBackend:
    """Make the memory and the kernels on all ranks, or on none.

    Args:
        transport: Row exchanges of the group, with the operations of `collective.OPERATIONS`.
        communicator: NCCL's communicator of the ranks.
        collective: The backend for tables that are written from the CPU.
        num_bytes: Size of the table on each rank.
        num_cpu_bytes: Of these, bytes of host memory; 0 keeps the entries in device memory.
        timeout_s: How long to wait for entries that come over the network.
        may_use_network: Whether entries may come over the network.

    Raises:
        TopologyError: Entries are to be in host memory, and the ranks are not of one machine; or some would come over
            the network, and may not.
        TransportError: There is not enough memory, it cannot be shared, there is no network that can read, or another
            rank has no device backend.
        CompileError: A kernel does not compile.
        ConfigError: A part that is needed is not installed.

    Collective: yes.
    """
    if communicator.needs_gin and not num_cpu_bytes and not may_use_network:
        raise TopologyError(
            'entries of other nodes are got over the network with backend="device" only (got teams of '
            f"{communicator.lsa.num_ranks} of {communicator.num_ranks} ranks, on rank {communicator.rank}), since that "
            'part is little tested; pass backend="device" to use it'
        )
    device = communicator.device
    let_go_of_the_left(communicator)
    num_gpu_ranks = count_gpu_ranks(transport, device)
    host_storage = open_host_storage(transport, device, num_cpu_bytes) if num_cpu_bytes else None

    def make() -> DeviceBackend:
        storage: EntryStorage = host_storage or WindowStorage(communicator, num_bytes)
        network: Network | None = None
        fetcher = RowFetcher(
            rank=transport.rank, device=device, addresses=storage.addresses, num_gpu_ranks=num_gpu_ranks
        )
        if isinstance(storage, WindowStorage) and communicator.needs_gin:
            network = Network(communicator, storage, fetcher.table, timeout_s=timeout_s)
        # Last: what can fail on one rank alone must not leave the others in a collective step.
        fetcher.prepare()
        return DeviceBackend(transport, collective, storage=storage, fetcher=fetcher, network=network, device=device)

    backend = open_together(transport, make)
    if backend.has_network:
        backend.life = SharedLife(transport, communicator)
    return backend
