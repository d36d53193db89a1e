"""Owns which backend a buffer gets. The device backend is imported only where it is tried."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from deep_ep_core.backend_choice import BackendName, DeviceOpener
from deep_ep_core.errors import ConfigError
from deep_ep_core.transport import CollectiveTransport
from deep_ep_cp.backend import Backend
from deep_ep_cp.collective import CollectiveBackend

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator

__all__ = ["make_backend"]

_logger = logging.getLogger("deep_ep_cp")


def make_backend(
    transport: CollectiveTransport, device: torch.device, *, num_bytes: int, backend: BackendName, timeout_s: float
) -> Backend:
    """The backend that was asked for, or that the ranks can use.

    Args:
        transport: Row exchanges of the group, with the operations of `agreed`. The ranks have agreed on the next three.
        device: Device of the buffer.
        num_bytes: Size of its memory.
        backend: What was asked for.
        timeout_s: How long a rank is waited for.

    Raises:
        ConfigError: The device backend was asked for, and the buffer is on a CPU, or a part is not installed.
        TopologyError: It was asked for, and not all ranks reach each other.
        TransportError: It was asked for, and cannot be opened.

    Collective: yes.
    """
    if device.type == "cuda":
        opener = DeviceOpener(transport, device, backend=backend, timeout_s=timeout_s, logger=_logger)
        opener.open_communicator()
        opened = opener.open_backend(
            lambda communicator: _open_device(transport, communicator, num_bytes=num_bytes, timeout_s=timeout_s)
        )
        if opened is not None:
            return opened
    elif backend == "device":
        raise ConfigError(
            f'backend="device" must have a buffer on a CUDA device (got {device}, on rank {transport.rank}); pass '
            'device="cuda", or use backend="auto" or "collective"'
        )
    else:
        _logger.info("ContextBuffer uses the collective backend: its device is the CPU")
    return CollectiveBackend(transport, torch.empty(num_bytes, dtype=torch.uint8, device=device))


def _open_device(
    transport: CollectiveTransport, communicator: Communicator, *, num_bytes: int, timeout_s: float
) -> Backend:
    from deep_ep_cp.device.backend import open_device_backend  # only where there is a GPU to use it on

    return open_device_backend(transport, communicator, num_bytes=num_bytes, timeout_s=timeout_s)
