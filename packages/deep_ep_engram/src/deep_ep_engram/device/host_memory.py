"""Owns entries in host memory that the GPUs of one machine read: one shared segment a rank, mapped by all of them.

A segment is an anonymous file of the kernel, which other ranks open through `/proc`; it needs no name, no room in
`/dev/shm`, and goes with the last process. Its pages are locked, and mapped for the GPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
import weakref
from pathlib import Path

import torch

from deep_ep_core.backend_choice import OPEN_DEVICE, open_together
from deep_ep_core.errors import TopologyError, TransportError
from deep_ep_core.jit.driver import driver_call
from deep_ep_core.nccl.communicator import wait_for_device
from deep_ep_core.topology import host_identity
from deep_ep_core.transport import CollectiveTransport

__all__ = ["HostSegment", "HostStorage", "open_host_storage"]

_NONCE_BYTES = 7
# CU_MEMHOSTREGISTER_PORTABLE and CU_MEMHOSTREGISTER_DEVICEMAP.
_REGISTER_FLAGS = 1 | 2


class HostSegment:
    """Shared memory of one rank, as this process sees it.

    Args:
        fd: An open file of at least `num_bytes` bytes. Stays the caller's; the mapping does not need it.
        num_bytes: Size.

    Attributes:
        bytes: The memory, flat uint8 on the CPU.

    Raises:
        TransportError: It cannot be mapped.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        try:
            self.bytes = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        except OSError as error:
            raise TransportError(
                f"a process must be able to map the {num_bytes} bytes of each rank's entries ({error}); raise the "
                "limit of its address space (ulimit -v), or keep the entries in device memory",
                call="mmap",
            ) from error
        self._unregister: weakref.finalize[..., HostSegment] | None = None

    def register(self, device: torch.device) -> int:
        """Lock the pages and map them for a CUDA device, until `close` or until nothing refers to this any more.

        Args:
            device: The device, which is the current one.

        Returns:
            Their address on the device.

        Raises:
            TransportError: The driver cannot, for example because a limit of locked memory is reached.
        """
        address = self.bytes.data_ptr()
        driver_call("cuMemHostRegister", address, self.bytes.numel(), _REGISTER_FLAGS)
        self._unregister = weakref.finalize(self, _unregister, address, self.bytes, device)
        # At exit the driver goes with the process.
        self._unregister.atexit = False
        return int(driver_call("cuMemHostGetDevicePointer", address, 0))

    def close(self) -> None:
        """Take the pages back from the driver, once the device has done what it was given; may be called again.

        The memory goes with its last tensor.
        """
        if self._unregister is not None:
            self._unregister()


def _unregister(address: int, keep: torch.Tensor, device: torch.device) -> None:
    # This runs wherever the last reference goes, under kernels that still read and in threads that never used CUDA: the
    # wait is for the kernels, and makes the device's context that of the thread. Where the driver has gone before, so
    # has the mapping.
    with contextlib.suppress(TransportError, RuntimeError), torch.cuda.device(device):
        wait_for_device(device)
        driver_call("cuMemHostUnregister", address)
    del keep


class HostStorage:
    """Entries in host memory of one machine. Made by `open_host_storage`.

    Args:
        own: This rank's segment.
        segments: The segments of all ranks, `own` among them.
        addresses: See `EntryStorage`.
        device: Device of this rank.
    """

    def __init__(
        self, own: HostSegment, segments: list[HostSegment], addresses: tuple[int, ...], device: torch.device
    ) -> None:
        self.addresses = addresses
        self._own = own
        self._segments = segments
        self._device = device

    def fill(self, entries: torch.Tensor) -> None:
        """Copy this rank's entries in; the host waits until they are there."""
        if entries.numel():
            self._own.bytes[: entries.nbytes].copy_(entries.reshape(-1).view(torch.uint8))

    def close(self) -> None:
        """Unmap the segments, once the device has done what it was given; may be called again."""
        if self._segments:
            torch.cuda.synchronize(self._device)
        while self._segments:
            self._segments.pop().close()


class _OwnFile:
    """The file behind this rank's segment, until all others have mapped it."""

    def __init__(self, num_bytes: int) -> None:
        # The first bytes tell a rank that it has opened the right file: process numbers mean nothing in another
        # namespace.
        self.nonce = int.from_bytes(secrets.token_bytes(_NONCE_BYTES), "little")
        self.fd = -1
        try:
            self.fd = os.memfd_create("deep_ep_engram", os.MFD_CLOEXEC)
            # Without it a lack of memory would show as a signal in the middle of a write.
            os.posix_fallocate(self.fd, 0, num_bytes)
            os.pwrite(self.fd, self.nonce.to_bytes(8, "little"), 0)
        except OSError as error:
            self.close()
            raise TransportError(
                f"the host must have {num_bytes} bytes of shared memory for the entries of each rank ({error}); free "
                "some, make the table smaller, or keep the entries in device memory",
                call="memfd_create",
            ) from error

    def close(self) -> None:
        """Close the file; what is mapped stays. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_host_storage(transport: CollectiveTransport, device: torch.device, num_bytes: int) -> HostStorage:
    """Make the memory of all ranks, and map all of it on each.

    Args:
        transport: Row exchanges of the group, with an operation `OPEN_DEVICE`.
        device: CUDA device of this rank.
        num_bytes: Size for each rank, the same on all.

    Raises:
        TopologyError: The ranks are not of one machine.
        TransportError: There is not enough memory, or it cannot be shared or mapped for the GPU.

    Collective: yes.
    """
    file = open_together(transport, lambda: _OwnFile(num_bytes))
    host = int.from_bytes(hashlib.sha256(host_identity().encode()).digest()[:7], "little")
    try:
        told = transport.begin(OPEN_DEVICE, [], [[host, os.getpid(), file.fd, file.nonce]] * transport.num_ranks)
        elsewhere = [rank for rank, values in enumerate(told.peer_values) if values[0] != told.peer_values[0][0]]
        if elsewhere:
            raise TopologyError(
                "entries in host memory are read by GPUs of the same machine only, so all ranks must be on that of "
                f"rank 0 (got others for ranks {', '.join(map(str, elsewhere))}, seen on rank {transport.rank}); pass "
                'num_cpu_bytes=0 to keep them in device memory, or use backend="collective"'
            )
        return open_together(transport, lambda: _map_all(transport.rank, told.peer_values, device, num_bytes))
    finally:
        # Behind the second meeting: all ranks have mapped it.
        file.close()


def _map_all(rank: int, peer_values: list[list[int]], device: torch.device, num_bytes: int) -> HostStorage:
    segments: list[HostSegment] = []
    addresses: list[int] = []
    try:
        with torch.cuda.device(device):
            for peer, (_, pid, fd, nonce) in enumerate(peer_values):
                segments.append(_map_of(rank, peer, f"/proc/{pid}/fd/{fd}", nonce, num_bytes))
                addresses.append(segments[-1].register(device))
    except TransportError:
        for segment in segments:
            segment.close()
        raise
    return HostStorage(segments[rank], segments, tuple(addresses), device)


def _map_of(rank: int, peer: int, path: str, nonce: int, num_bytes: int) -> HostSegment:
    try:
        with Path(path).open("r+b", buffering=0) as file:
            segment = HostSegment(file.fileno(), num_bytes)
    except (OSError, ValueError) as error:  # ValueError: another file, which is shorter
        raise TransportError(
            f"rank {rank} must be able to open the shared memory of rank {peer}, but could not ({error}); ranks of a "
            "machine must run as one user and see each other's processes (one container, or a shared PID namespace)",
            call="open",
        ) from error
    found = int.from_bytes(bytes(segment.bytes[:8].tolist()), "little")
    if found != nonce:
        raise TransportError(
            f"rank {rank} must be able to open the shared memory of rank {peer}, but found another file; ranks of a "
            "machine must see each other's processes under the same numbers (one container, or a shared PID namespace)",
            call="open",
        )
    return segment
