"""A make-believe libnccl in Python, and what ranks do with it: `NcclLibrary` calls it as it would the real one."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.distributed as dist

from deep_ep_core.errors import DeepEPError, TransportError
from deep_ep_core.nccl import Communicator
from deep_ep_core.nccl.library import NcclLibrary
from deep_ep_core.nccl.structs import TeamStruct
from deep_ep_core.window import ControlRegion, SymmetricMemory

CPU = torch.device("cpu")
COMM = 0xC0
PEER_STRIDE = 1 << 40
_IN_PROGRESS = 7


class _Function:
    """A function as ctypes gives it: callable, and its types can be set."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)


class FakeNccl:
    """Its calls, in order, are in `log`; `failures` gives calls the result code to return instead of working."""

    def __init__(self, version: int = 23007, *, num_ranks: int = 1, rank: int = 0, lsa_size: int | None = None):
        self.version = version
        self.num_ranks, self.rank = num_ranks, rank
        self.lsa_size = num_ranks if lsa_size is None else lsa_size
        self.log: list[str] = []
        self.failures: dict[str, int] = {}
        self.missing: set[str] = set()
        self.last_error = b""
        self.has_device_api = True
        self.can_register = True
        self.gin_type = self.railed_gin_type = 0
        self.num_polls_in_progress = 0
        self.unique_ids: list[bytes] = []
        self.requirements: Any = None
        self.windows: dict[int, int] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nccl") or name in self.__dict__.get("missing", ()):
            raise AttributeError(name)
        work = getattr(type(self), name.replace("nccl", "_", 1), None)
        if work is None:
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self.log.append(name)
            if name in self.failures:
                return self.failures[name]
            result = work(self, *args)
            return 0 if result is None else result

        function = _Function(call)
        setattr(self, name, function)
        return function

    def library(self) -> NcclLibrary:
        return NcclLibrary(self, path="/fake/libnccl.so.2", found_via="a test")

    def count(self, name: str) -> int:
        return self.log.count(name)

    def _GetVersion(self, out):  # noqa: N802
        out._obj.value = self.version

    def _GetErrorString(self, code):  # noqa: N802
        return f"text of {code}".encode()

    def _GetLastError(self, comm):  # noqa: N802
        return self.last_error

    def _GetUniqueId(self, out):  # noqa: N802
        out._obj.internal[:] = [(7 * place) % 256 for place in range(128)]

    def _CommInitRankConfig(self, out, num_ranks, unique_id, rank, config):  # noqa: N802
        assert (num_ranks, rank) == (self.num_ranks, self.rank)
        assert config._obj.blocking == 0
        self.unique_ids.append(bytes(unique_id.internal))
        out._obj.value = COMM
        return _IN_PROGRESS

    def _CommGetAsyncError(self, comm, out):  # noqa: N802
        assert comm == COMM
        if self.num_polls_in_progress > 0:
            self.num_polls_in_progress -= 1
            out._obj.value = _IN_PROGRESS
        else:
            out._obj.value = self.failures.get("async", 0)

    def _CommAbort(self, comm):  # noqa: N802
        assert comm == COMM

    def _CommQueryProperties(self, comm, out):  # noqa: N802
        found = out._obj
        assert found.size == ctypes.sizeof(found)
        found.rank, found.nRanks = self.rank, self.num_ranks
        found.deviceApiSupport = self.has_device_api
        found.ginType, found.railedGinType = self.gin_type, self.railed_gin_type
        found.nLsaTeams = self.num_ranks // self.lsa_size
        if hasattr(found, "devCommRuntimeVersionSize"):
            found.devCommRuntimeVersionSize = 248

    def _TeamWorld(self, comm):  # noqa: N802
        return TeamStruct(self.num_ranks, self.rank, 1)

    def _TeamLsa(self, comm):  # noqa: N802
        return TeamStruct(self.lsa_size, self.rank % self.lsa_size, 1)

    def _TeamRail(self, comm):  # noqa: N802
        return TeamStruct(self.num_ranks // self.lsa_size, self.rank // self.lsa_size, self.lsa_size)

    def _MemAlloc(self, out, num_bytes):  # noqa: N802
        out._obj.value = 0xD000

    def _MemFree(self, address):  # noqa: N802
        pass

    def _CommWindowRegister(self, comm, address, num_bytes, out, flags):  # noqa: N802
        if self.can_register:
            handle = 0xA000 + len(self.windows)
            self.windows[handle] = address
            out._obj.value = handle

    def _CommWindowDeregister(self, comm, handle):  # noqa: N802
        del self.windows[handle]

    def _GetLsaDevicePointer(self, handle, offset, lsa_rank, out):  # noqa: N802
        if not 0 <= lsa_rank < self.lsa_size:
            return 4
        out._obj.value = (lsa_rank + 1) * PEER_STRIDE + offset

    def _GetPeerDevicePointer(self, handle, offset, rank, out):  # noqa: N802
        lsa_rank = rank - self.rank // self.lsa_size * self.lsa_size
        is_reached = 0 <= lsa_rank < self.lsa_size
        out._obj.value = (lsa_rank + 1) * PEER_STRIDE + offset if is_reached else None

    def _DevCommCreate(self, comm, requirements, out):  # noqa: N802
        self.requirements = requirements._obj
        is_old = self.version < 23100
        words = ctypes.cast(ctypes.addressof(out._obj), ctypes.POINTER(ctypes.c_uint32))
        words[(200 if is_old else 152) // 4] = self.requirements.ginContextCount * 2

    def _DevCommDestroy(self, comm, data):  # noqa: N802
        pass


class HostMemory:
    """Memory of this process in the place of a GPU's; dies with its last reference."""

    def __init__(self, num_bytes: int, alignment: int = 4096) -> None:
        self._buffer = ctypes.create_string_buffer(b"\xee" * (num_bytes + alignment))
        self.address = -(-ctypes.addressof(self._buffer) // alignment) * alignment


def open_fake(fake: FakeNccl, **options: Any) -> Communicator:
    """A communicator over the default group that calls a make-believe NCCL."""
    return Communicator.open(None, CPU, load_library=fake.library, **options)


def open_on_ranks(versions: list[int]) -> tuple[bytes, str]:
    """Each rank has its own NCCL version, 0 for none. Returns the unique id that it heard, and how it stands."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    fake = FakeNccl(versions[rank], num_ranks=num_ranks, rank=rank, lsa_size=1)

    def load() -> NcclLibrary:
        if versions[rank] == 0:
            raise TransportError("no NCCL here", call="dlopen")
        return fake.library()

    with Communicator.open(None, CPU, load_library=load, timeout_s=30.0) as communicator:
        return fake.unique_ids[0], repr(communicator)


def open_window_on_ranks(control_bytes: list[int], has_memory: list[bool]) -> list[int | None] | str:
    """Each rank has its own control region, and memory or none. Returns where it sees the peers, or its error."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    fake = FakeNccl(num_ranks=num_ranks, rank=rank, lsa_size=2)

    def allocate(num_bytes: int) -> HostMemory:
        if not has_memory[rank]:
            raise TransportError(f"rank {rank} has no memory", call="ncclMemAlloc")
        return HostMemory(num_bytes)

    with open_fake(fake, timeout_s=30.0) as communicator:
        region = ControlRegion(name="test.flags", num_bytes=control_bytes[rank])
        try:
            memory = SymmetricMemory(communicator, regions=[region], heap_bytes=4096, allocate=allocate)
        except DeepEPError as error:
            return str(error)
        with memory:
            return [memory.peer_address(peer, 64) for peer in range(num_ranks)]
