"""Owns entries that no load reaches: they are got over the network into a stage in the window, and waited for later.

Owners take no part. Copying them on from the stage is for `fetcher`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.align import align_up
from deep_ep_core.errors import TransportError
from deep_ep_core.heap import Heap
from deep_ep_core.jit import LaunchShape, ParamsStruct, PreparedLaunch, get_kernels
from deep_ep_core.jit.driver import driver_call, load_driver
from deep_ep_core.nccl import Communicator, DeviceComm, DeviceCommConfig, GinConfig, GinConnection
from deep_ep_core.nccl.properties import GinType
from deep_ep_core.wait import TimeoutLog, timeout_to_ns
from deep_ep_engram.device.fetch_kernel import EntryTable, StagedRows
from deep_ep_engram.device.fetcher import FetchRequest, index_list
from deep_ep_engram.device.network_kernel import (
    NETWORK_THREADS,
    RowClaims,
    get_params_type,
    get_rows_spec,
    wait_params_type,
    wait_rows_spec,
)
from deep_ep_engram.device.storage import WindowStorage
from deep_ep_engram.sizing import SIZE_ALIGNMENT_BYTES

__all__ = ["Gets", "Network"]

# A hint to NCCL. A context is a queue pair a rank; gets of one block go through one context.
_NUM_CONTEXTS = 4
_WAIT_PHASE = "the arrival of entries"
_MS_PER_S = 1000


@dataclass(slots=True, kw_only=True, eq=False)
class Gets:
    """What one fetch has asked for.

    Attributes:
        stage: `[num_rows, row_bytes]`, in the window: where it arrives.
        slot_of_row: Which slot of the claims each row has; undefined for rows that come in other ways.
        row_of_slot: Which row got the entry of a slot.
        has_asked: Which ranks each context has asked.
        num_contexts: Contexts that were used.
    """

    stage: torch.Tensor
    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    has_asked: torch.Tensor
    num_contexts: int

    @property
    def staged(self) -> StagedRows:
        """The same for the kernel that copies rows."""
        return StagedRows(
            rows=self.stage.data_ptr(),
            slot_of_row=self.slot_of_row.data_ptr(),
            row_of_slot=self.row_of_slot.data_ptr(),
        )

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Let torch know that a stream uses the lists. The stage knows its last stream by itself."""
        for tensor in (self.slot_of_row, self.row_of_slot, self.has_asked):
            tensor.record_stream(stream)


class Network:
    """The kernels that get entries, and the stage that they arrive in.

    Args:
        communicator: The ranks, of which some are not reached by load and store.
        storage: The window, with the entries of all ranks.
        table: The lists to look entries up in.
        timeout_s: How long to wait for entries.

    Raises:
        TransportError: NCCL has no GIN here, or one that cannot read.
        CompileError: A kernel does not compile: it takes nvcc and NCCL's headers.

    Collective: the constructor is; `close` is not.
    """

    def __init__(
        self, communicator: Communicator, storage: WindowStorage, table: EntryTable, *, timeout_s: float
    ) -> None:
        self._device = communicator.device
        self._storage = storage
        self._table = table
        self._num_ranks = communicator.num_ranks
        self._device_comm = DeviceComm(
            communicator,
            DeviceCommConfig(gin=GinConfig(connection=GinConnection.FULL, num_contexts=_NUM_CONTEXTS)),
        )
        gin_type = self._device_comm.gin_type
        if gin_type in (GinType.NONE, GinType.EFA_GDA):
            self._device_comm.close()
            why = "EP_DISABLE_GIN is set" if gin_type is GinType.NONE else "that of EFA has no reads"
            raise TransportError(
                "entries of other nodes need a GIN that can read from them, but there is none "
                f'({why}, on {communicator.where}); use backend="collective"',
                call="ncclDevCommCreate",
            )
        # Where NCCL does not tell how many it gave, one is there.
        self.num_contexts = self._device_comm.num_gin_contexts or 1
        num_bytes, device_idx = self._device_comm.num_bytes, self._device.index or 0
        self._get_params, self._wait_params = get_params_type(num_bytes), wait_params_type(num_bytes)
        self._get_kernel, self._wait_kernel = get_kernels(
            (get_rows_spec(num_bytes), wait_rows_spec(num_bytes)), device_idx
        )
        self._launches: dict[tuple[bool, int], PreparedLaunch] = {}
        self._log = TimeoutLog(rank=communicator.rank, device=self._device)
        self._wait = self._log.params(first_phase=self._log.add_phases([_WAIT_PHASE]), timeout_s=timeout_s)
        clock_khz = driver_call(
            "cuDeviceGetAttribute",
            load_driver().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE,
            driver_call("cuDeviceGet", device_idx),
        )
        self._timeout_cycles = min(timeout_to_ns(timeout_s) // _MS_PER_S**2 * clock_khz, 2**63 - 1)
        self._stage: Heap | None = None

    def set_entries(self, num_bytes: int) -> None:
        """Let the stage be what the entries of this rank leave of the window. No fetch may be under way."""
        owner = self._storage.bytes_of_rank()
        begin = align_up(num_bytes, SIZE_ALIGNMENT_BYTES)
        self._stage = Heap(owner.data_ptr() + begin, owner.numel() - begin, self._device, owner)

    def try_ask(self, request: FetchRequest, num_contexts: int, stream: int) -> Gets | None:
        """Ask owners for the entries that no load reaches, each distinct one once.

        Args:
            request: What is wanted.
            num_contexts: Contexts to use; more than there are count as all.
            stream: Handle of the current stream.

        Returns:
            What was asked for; None where the stage has no room for it.
        """
        assert self._stage is not None, "a table is written before it is fetched from"
        num_rows = request.num_rows
        stage = self._stage.try_empty((num_rows * request.row_bytes,), torch.uint8)
        if stage is None:
            return None
        num_contexts = min(num_contexts, self.num_contexts)
        # Twice as many slots as rows, and a power of two.
        num_slots = 1 << (2 * num_rows - 1).bit_length()
        num_words = -(-num_contexts * self._num_ranks // 2)
        zeros = torch.zeros(num_slots + num_words, dtype=torch.int64, device=self._device)
        keys, has_asked = zeros[:num_slots], zeros[num_slots:]
        row_of_slot = torch.empty(num_slots, dtype=torch.int64, device=self._device)
        slot_of_row = torch.empty(num_rows, dtype=torch.int64, device=self._device)
        params = self._get_params(
            dev_comm=self._device_comm.data,
            window=self._storage.memory.window.handle,
            table=self._table,
            indices=index_list(request.indices),
            claims=RowClaims(
                keys=keys.data_ptr(),
                row_of_slot=row_of_slot.data_ptr(),
                slot_of_row=slot_of_row.data_ptr(),
                num_slots=num_slots,
            ),
            has_asked=has_asked.data_ptr(),
            entries_offset=self._storage.offset,
            stage_offset=stage.data_ptr() - self._storage.memory.address,
            num_rows=num_rows,
            row_bytes=request.row_bytes,
        )
        self._launch(params, num_contexts, stream)
        return Gets(
            stage=stage,
            slot_of_row=slot_of_row,
            row_of_slot=row_of_slot,
            has_asked=has_asked,
            num_contexts=num_contexts,
        )

    def wait(self, gets: Gets, stream: int) -> None:
        """Let a stream wait until all that was asked for is in the stage; a rank that is late is in the log."""
        params = self._wait_params(
            dev_comm=self._device_comm.data,
            wait=self._wait,
            has_asked=gets.has_asked.data_ptr(),
            timeout_cycles=self._timeout_cycles,
            num_ranks=self._num_ranks,
        )
        self._launch(params, gets.num_contexts, stream)

    def check(self) -> None:
        """Raise if entries did not come in time. No CUDA call.

        Raises:
            CommTimeoutError: It names the owner.
        """
        self._log.check()

    def close(self) -> None:
        """Give the contexts back; may be called again. Collective: no."""
        self._device_comm.close()

    def _launch(self, params: ParamsStruct, num_contexts: int, stream: int) -> None:
        is_get = type(params) is self._get_params
        found = self._launches.get((is_get, num_contexts))
        if found is None:
            shape = LaunchShape(grid=(num_contexts, 1, 1), block=(NETWORK_THREADS, 1, 1))
            kernel = self._get_kernel if is_get else self._wait_kernel
            found = self._launches[is_get, num_contexts] = PreparedLaunch(kernel, shape)
        found(params, stream)
