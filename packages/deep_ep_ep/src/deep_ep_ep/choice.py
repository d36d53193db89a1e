"""Owns the choice of a backend when a buffer is made: what was asked for, what the ranks can do, and why not more.

The device backend is imported only where it is tried.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.distributed as dist

from deep_ep_core.domains import remember_topology
from deep_ep_core.errors import CompileError, ConfigError, TopologyError, TransportError
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_ep.backend import Backend
from deep_ep_ep.checks import BufferFacts
from deep_ep_ep.collective import CollectiveBackend

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator

__all__ = ["BackendName", "DeviceOpener", "RecvMemory", "agreed_by_choice", "check_choice"]

BackendName = Literal["auto", "collective", "device"]
"""What `ElasticBuffer` may be asked for."""

RecvMemory = Literal["auto", "window", "torch"]
"""Where received rows live, see `ElasticBuffer`."""

_logger = logging.getLogger("deep_ep_ep")
# What stands in the way of the device backend, and not of the collective one.
_REFUSALS = (TransportError, TopologyError, CompileError, ConfigError)


def check_choice(backend: object, recv_memory: object) -> None:
    """Check the names.

    Raises:
        ConfigError: One is none of those that there are.
    """
    if backend not in get_args(BackendName):
        raise ConfigError(f'backend must be "auto", "collective" or "device" (got {backend!r})')
    if recv_memory not in get_args(RecvMemory):
        raise ConfigError(f'recv_memory must be "auto", "window" or "torch" (got {recv_memory!r})')


def agreed_by_choice(backend: BackendName, recv_memory: RecvMemory) -> list[AgreedField]:
    """The values of a choice that every rank must pass alike."""
    backends, memories = get_args(BackendName), get_args(RecvMemory)
    return [
        AgreedField(name="backend", value=backends.index(backend), show=lambda value: str(backends[value])),
        AgreedField(name="recv_memory", value=memories.index(recv_memory), show=lambda value: str(memories[value])),
        AgreedField(
            name="use of CUDA",
            value=int(torch.cuda.is_available()),
            show=lambda value: "has CUDA" if value else "has none",
        ),
    ]


class DeviceOpener:
    """Opens the device backend for one buffer, in two steps, where it is asked for or worth trying.

    Args:
        transport: Row exchanges of the group.
        device: Device of this rank.
        backend: What was asked for.
        recv_memory: Where received rows live.
        cpu_timeout_s: How long the host waits for a rank.
        gpu_timeout_s: How long kernels wait for a rank.

    Attributes:
        nccl_comm_handle: NCCL's communicator where the device backend is used, else None.
    """

    def __init__(
        self,
        transport: CollectiveTransport,
        device: torch.device,
        *,
        backend: BackendName,
        recv_memory: RecvMemory,
        cpu_timeout_s: float,
        gpu_timeout_s: float,
    ) -> None:
        self._transport = transport
        self._device = device
        self._must_open = backend == "device"
        self._recv_memory: RecvMemory = recv_memory
        self._cpu_timeout_s, self._gpu_timeout_s = cpu_timeout_s, gpu_timeout_s
        self._communicator: Communicator | None = None
        self._why_not = _reason_against(transport.group, backend)
        self.nccl_comm_handle: object | None = None

    def open_communicator(self) -> None:
        """Open NCCL's communicator, and let the group's domains be those that NCCL knows.

        Raises:
            ConfigError: The device backend was asked for, and this machine has no GPU for it.
            TransportError: It was asked for, and NCCL cannot be used.

        Collective: yes.
        """
        if self._why_not is not None:
            if self._must_open:
                raise ConfigError(
                    f'backend="device" needs GPUs (got none: {self._why_not}, on rank {self._transport.rank}); '
                    'use backend="auto" or "collective"'
                )
            return
        from deep_ep_core.nccl import shared_communicator

        try:
            self._communicator = shared_communicator(self._transport.group, self._device, timeout_s=self._cpu_timeout_s)
        except _REFUSALS as error:
            if self._must_open:
                raise
            self._why_not = str(error)
            return
        remember_topology(self._transport.group, self._communicator.topology)

    def open_backend(self, collective: CollectiveBackend, facts: BufferFacts, *, num_bytes: int) -> Backend:
        """The backend to use.

        Args:
            collective: The collective backend of the buffer.
            facts: What the buffer's checks know.
            num_bytes: Size of the buffer.

        Raises:
            TransportError, TopologyError, CompileError, ConfigError: The device backend was asked for, and cannot be
                opened.

        Collective: yes.
        """
        if self._communicator is None:
            _logger.info("ElasticBuffer uses the collective backend: %s", self._why_not)
            return collective
        from deep_ep_ep.device.backend import DeviceBackend, open_context

        try:
            context = open_context(
                self._transport,
                self._communicator,
                num_bytes=num_bytes,
                recv_memory=self._recv_memory,
                gpu_timeout_s=self._gpu_timeout_s,
            )
        except _REFUSALS as error:
            if self._must_open:
                raise
            _logger.info("ElasticBuffer uses the collective backend: %s", error)
            return collective
        self.nccl_comm_handle = self._communicator.handle
        return DeviceBackend(context, collective, facts)


def _reason_against(group: dist.ProcessGroup, backend: BackendName) -> str | None:
    """Why the device backend is not even tried; the same on all ranks, which agree on what it depends on."""
    if backend == "collective":
        return 'backend="collective" was passed'
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if backend == "auto" and not _has_cuda_backend(group):
        return "the group has no CUDA backend"
    return None


def _has_cuda_backend(group: dist.ProcessGroup) -> bool:
    return "cuda" in dist.get_backend_config(group)
