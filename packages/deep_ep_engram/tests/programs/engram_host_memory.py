"""Shared host memory between ranks on CPUs, with a driver that maps nothing: what is shared is read by the host."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import tempfile
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist

from deep_ep_core.errors import TransportError
from deep_ep_core.transport import CollectiveTransport
from deep_ep_engram.collective import OPERATIONS
from deep_ep_engram.device import host_memory

NUM_BYTES = 2 << 20


def open_transport() -> CollectiveTransport:
    return CollectiveTransport(None, timeout_s=20.0, name="EngramTable", operations=OPERATIONS)


@contextlib.contextmanager
def without_driver() -> Iterator[list[str]]:
    """A driver that does nothing, and sees memory where the host does; gives the names of the calls."""
    calls: list[str] = []

    def call(name: str, *arguments: object) -> object:
        calls.append(name)
        return arguments[0] if name == "cuMemHostGetDevicePointer" else None

    with (
        mock.patch.object(host_memory, "driver_call", call),
        mock.patch.object(host_memory, "wait_for_device", lambda device: calls.append(f"wait for {device}")),
        mock.patch.object(torch.cuda, "device", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "synchronize", side_effect=lambda _: calls.append("synchronize")),
    ):
        yield calls


def check_shared() -> list[str]:
    """Each rank reads what the others have filled in, also once their files are closed; returns the driver's calls."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_files = len(os.listdir("/proc/self/fd"))
    with without_driver() as calls:
        storage = host_memory.open_host_storage(open_transport(), torch.device("cpu"), NUM_BYTES)
        assert len(os.listdir("/proc/self/fd")) <= num_files + num_ranks, "files are left open"
        storage.fill(torch.full((100, 7), rank + 1, dtype=torch.bfloat16))
        storage.fill(torch.empty(0, 7, dtype=torch.bfloat16))
        dist.barrier()
        for peer, address in enumerate(storage.addresses):
            seen = (ctypes.c_uint16 * 700).from_address(address)
            assert set(seen) == {torch.tensor(peer + 1.0).bfloat16().view(torch.int16).item()}, peer
        dist.barrier()
        storage.close()
        storage.close()
    return calls


def drop_a_mapped_segment(device: torch.device) -> list[str]:
    """Without `close`, as where a table is dropped; returns the calls, made with the device current."""
    with without_driver() as calls, tempfile.TemporaryFile() as file:
        file.truncate(NUM_BYTES)
        segment = host_memory.HostSegment(file.fileno(), NUM_BYTES)
        segment.register(device)
        del segment
        torch.cuda.device.assert_called_once_with(device)
    return calls


def open_from_another_machine(odd_rank: int) -> None:
    """`odd_rank` says that it is elsewhere."""
    name = "far" if dist.get_rank() == odd_rank else "near"
    with without_driver(), mock.patch.object(host_memory, "host_identity", return_value=name):
        host_memory.open_host_storage(open_transport(), torch.device("cpu"), NUM_BYTES)


def find_another_file(odd_rank: int) -> None:
    """What `odd_rank` finds under the numbers that it was told is not what its peers made."""
    original = host_memory._map_of

    def find(rank: int, peer: int, path: str, nonce: int, num_bytes: int) -> host_memory.HostSegment:
        return original(rank, peer, path, nonce + (rank == odd_rank and peer != rank), num_bytes)

    with without_driver(), mock.patch.object(host_memory, "_map_of", find):
        host_memory.open_host_storage(open_transport(), torch.device("cpu"), NUM_BYTES)


def open_without_permission(odd_rank: int) -> None:
    original = host_memory._map_of

    def find(rank: int, peer: int, path: str, nonce: int, num_bytes: int) -> host_memory.HostSegment:
        return original(rank, peer, path + "0000" if rank == odd_rank else path, nonce, num_bytes)

    with without_driver(), mock.patch.object(host_memory, "_map_of", find):
        host_memory.open_host_storage(open_transport(), torch.device("cpu"), NUM_BYTES)


def run_short_of_memory(odd_rank: int) -> None:
    """No file of `odd_rank` may be so large."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == odd_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with without_driver():
            host_memory.open_host_storage(open_transport(), torch.device("cpu"), NUM_BYTES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refuse_to_map(odd_rank: int) -> list[str]:
    """The driver of `odd_rank` maps one segment and no more; returns its calls."""
    with without_driver() as calls:
        original = host_memory.driver_call

        def call(name: str, *arguments: object) -> object:
            if dist.get_rank() == odd_rank and name == "cuMemHostRegister" and name in calls:
                raise TransportError("cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY", call=name)
            return original(name, *arguments)

        try:
            with mock.patch.object(host_memory, "driver_call", call):
                host_memory.open_host_storage(open_transport(), torch.device("cpu"), NUM_BYTES)
        except TransportError as error:
            return [str(error), *calls]
    return ["accepted"]
