"""Owns `EngramTable`: the public calls, and the choice of a backend.

It moves nothing itself: arguments are checked in `checks`, entries are moved by a `Backend`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from deep_ep_core.backend_choice import BackendName, DeviceOpener, agreed_by_backend, check_backend
from deep_ep_core.errors import ConfigError, RankMismatchError
from deep_ep_core.transport import CollectiveTransport
from deep_ep_engram.backend import Backend, FetchHook
from deep_ep_engram.checks import (
    TableFacts,
    TableShape,
    agreed_by_table,
    check_fetch,
    check_table,
    check_write,
)
from deep_ep_engram.collective import OPERATIONS, CollectiveBackend
from deep_ep_engram.sizing import get_engram_storage_size_hint

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator

__all__ = ["EngramTable"]

_logger = logging.getLogger("deep_ep_engram")


class EngramTable:
    """A table whose entries are sharded over the ranks of a group, and fetched by index.

    The entries of rank 0 come first, then those of rank 1, and so on: with 100 entries a rank, index 250 is entry 50 of
    rank 2. Ranks may hold different numbers of entries, none included.

    Args:
        group: Any `torch.distributed` group; None for the default group.
        num_bytes: Bytes for the entries of a rank and the rows of one fetch together, a multiple of 2 MiB. The
            collective backend reserves nothing, but holds calls to the size, so that what runs on a laptop also runs on
            a cluster. The device backend reserves the host part, or all of it in device memory where there is none.
            Must be alike on all ranks.
        num_cpu_bytes: Of these, bytes of host memory for the entries, a multiple of 2 MiB; 0 keeps the entries in the
            memory of the device they are written from. `get_engram_storage_size_hint` gives both parts. On the device
            backend GPUs read host memory by themselves, so all ranks must be on one machine. Must be alike on all
            ranks.
        num_cpu_timeout_secs: How long a call, or a hook, may wait for another rank before it names it and raises.
        backend: "collective" runs on any group. "device" fetches by CUDA kernels, which read the entries of GPUs in
            the same NVLink domain directly and get those of others over the network; it needs NCCL 2.30.4 or newer.
            "auto" takes "device" where the group has a CUDA backend, loads reach all entries and it can be opened, else
            "collective", and logs why. Tables that are written from the CPU are always those of the collective backend.
            Must be alike on all ranks.

    Attributes:
        group, rank_idx, num_ranks: The group and this rank's place in it.
        num_bytes, num_cpu_bytes: As above.
        runtime: The backend; None after `close`.

    Raises:
        ConfigError: An argument cannot be taken.
        RankMismatchError: Ranks passed different arguments.
        CommTimeoutError: A rank did not take part.

    Collective: yes. `close` and dropping the table are not.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_bytes: int,
        num_cpu_bytes: int = 0,
        *,
        num_cpu_timeout_secs: float = 300,
        backend: BackendName = "auto",
    ) -> None:
        check_table(num_bytes, num_cpu_bytes, num_cpu_timeout_secs)
        check_backend(backend)
        timeout_s = float(num_cpu_timeout_secs)
        transport = CollectiveTransport(group, timeout_s=timeout_s, name="EngramTable", operations=OPERATIONS)
        transport.begin("open", [*agreed_by_table(num_bytes, num_cpu_bytes), *agreed_by_backend(backend)])
        self.group: dist.ProcessGroup = transport.group
        self.rank_idx = transport.rank
        self.num_ranks = transport.num_ranks
        self.num_bytes = num_bytes
        self.num_cpu_bytes = num_cpu_bytes
        self._facts = TableFacts(rank=self.rank_idx, num_bytes=num_bytes, num_cpu_bytes=num_cpu_bytes)
        self._shape: TableShape | None = None
        has_cuda = torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
        opener = DeviceOpener(transport, device, backend=backend, timeout_s=timeout_s, logger=_logger)
        opener.open_communicator()
        collective = CollectiveBackend(transport, is_in_host_memory=num_cpu_bytes > 0)

        def make(communicator: Communicator) -> Backend:
            from deep_ep_engram.device.backend import open_device  # only where there is a GPU to use it on

            return open_device(
                transport,
                communicator,
                collective,
                num_bytes=num_bytes,
                num_cpu_bytes=num_cpu_bytes,
                timeout_s=timeout_s,
                may_use_network=backend == "device",
            )

        self.runtime: Backend | None = opener.open_backend(make) or collective

    @staticmethod
    def get_engram_storage_size_hint(
        num_entries: int, hidden: int, num_max_tokens_per_rank: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[int, int]:
        """`(num_gpu_bytes, num_cpu_bytes)` of a table.

        The arguments are described at `deep_ep_engram.get_engram_storage_size_hint`, which this is.

        Raises:
            ConfigError: A count is negative, or the dtype is another.

        Collective: no.
        """
        return get_engram_storage_size_hint(num_entries, hidden, num_max_tokens_per_rank, dtype)

    @torch.no_grad()
    def engram_write(self, storage: torch.Tensor, sf: torch.Tensor | None = None) -> None:
        """Fill the table, or replace all of it. Fetches that began before still give the entries of before.

        Args:
            storage: `[num_entries, hidden]` bfloat16 or float8_e4m3fn, contiguous: the entries of this rank, which are
                copied. `num_entries` may differ between ranks.
            sf: With float8_e4m3fn, and only then: `[num_entries of all ranks, num_packs]` of 4-byte elements (float32,
                or four UE8M0 exponents a pack), contiguous, on the device of `storage`; the same on every rank. It is
                not copied and must stay as it is until the next write.

        Raises:
            ConfigError: An argument cannot be taken; the table stays as it was.
            RankMismatchError: Ranks passed different shapes, dtypes or device types; the table stays as it was.
            CommTimeoutError: A rank died or is late.

        Collective: yes. Stream: copies on the current stream of the storage's device. On the device backend the host
        waits until the device has done all that it was given, before and after the copy: no kernel of any rank may read
        an entry that is half written. Not to be captured in a CUDA graph.
        """
        runtime = self._open_runtime()
        with self._rejections_reported("engram_write"):
            self._shape = runtime.write(check_write(self._facts, storage, sf))

    @torch.no_grad()
    def engram_fetch(
        self, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> FetchHook:
        """Begin to fetch entries; the hook that is returned waits for them and gives them.

        Equal indices cost one transfer over a network. Several fetches may be under way, and their hooks be called in
        any order, also in different orders on different ranks. Call each hook, or `close`, in the end.

        Args:
            indices: `[num_tokens, num_entries_per_token]` int32 or int64, contiguous, on the device of the storage, in
                [0, number of entries of all ranks). The shape may differ between ranks; no tokens are allowed.
            num_qps: Network contexts to use, where entries come over the network on the device backend; 0, or more than
                there are, takes all.
            use_tma_aligned_col_major_sf: Return the scales column by column, each column at a multiple of 16 bytes:
                strides `(1, ceil4(num_tokens))`, where ceil4 rounds up to a multiple of four.

        Returns:
            The hook. It returns `(data, sf)`, see `Fetched`: `data [num_tokens, num_entries_per_token * hidden]`, and
            `sf [num_tokens, num_entries_per_token * num_packs]` or None. It raises CommTimeoutError where a rank died
            before it sent the entries. A hook is not collective.

        Raises:
            ConfigError: An argument cannot be taken; raised before anything is sent. On the device backend the host
                does not look at the values of the indices: a kernel gives zeros for one that is out of range, and the
                error is raised, once, by the first hook or fetch of this table after the kernel's report, `close` at
                the latest. A write in between goes on: its peers wait for it.
            RankMismatchError: Ranks called different operations.
            CommTimeoutError: A rank died or is late.

        Collective: yes on the collective backend, where owners send their entries; a rank that wants nothing passes
        `[0, k]`; no on the device backend. Stream: the call and the hook work on the current stream of the storage's
        device, each on the one that is current when it is called. On the collective backend the host waits in the call
        for the counts and indices of all ranks, and in the hook for the entries. On the device backend it waits for
        nothing: the fetch runs on the communication stream, behind what the current stream has when it is called, and
        the hook makes the current stream wait. There both may be captured in one CUDA graph, where no entry comes over
        the network; a replay fetches what is in the table then, which must have the same hidden size, dtype and scales.
        """
        runtime = self._open_runtime()
        with self._rejections_reported("engram_fetch"):
            return runtime.fetch(check_fetch(self._facts, self._shape, indices, num_qps, use_tma_aligned_col_major_sf))

    def close(self) -> None:
        """Release the table. Waits for the fetches under way, whose hooks stay valid. May be called again.

        Where entries come over the network, peers may go on to read those of this rank: their memory goes once all
        ranks have closed. So a process meets the others before it ends.

        Raises:
            CommTimeoutError: A rank died before it sent the entries of a fetch under way.
            ConfigError: An index of a fetch was out of range, which no call has raised yet.

        Collective: no.
        """
        runtime, self.runtime, self._shape = self.runtime, None, None
        if runtime is not None:
            runtime.close()

    def __enter__(self) -> EngramTable:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # While an error is on its way, a wait would only hide it.
        if exc is None:
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self.runtime is None else f"{self.runtime.name} backend"
        content = "not written" if self._shape is None else _describe(self._shape)
        return f"EngramTable(rank {self.rank_idx} of {self.num_ranks}, {content}, {state})"

    def _open_runtime(self) -> Backend:
        if self.runtime is None:
            raise ConfigError(f"the table must be open (got a closed one, on rank {self.rank_idx}); make a new one")
        return self.runtime

    @contextlib.contextmanager
    def _rejections_reported(self, operation: str) -> Iterator[None]:
        """Let the peers know why this rank does not come, when it refuses its own arguments."""
        try:
            yield
        except RankMismatchError:
            raise
        except ConfigError as error:
            if self.runtime is not None:
                self.runtime.report_rejection(operation, str(error))
            raise


def _describe(shape: TableShape) -> str:
    return f"{shape.num_entries} entries of {shape.hidden} {str(shape.dtype).removeprefix('torch.')}"
