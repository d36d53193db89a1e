"""Owns the choice of a backend when a buffer is made: what was asked for, what the ranks can do, and why not more.

What a backend does belongs to the features. NCCL and the device backend of a feature are imported only where they are
tried.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, get_args

import torch
import torch.distributed as dist

from deep_ep_core.domains import remember_topology
from deep_ep_core.errors import CompileError, ConfigError, TopologyError, TransportError
from deep_ep_core.transport import AgreedField, CollectiveTransport

if TYPE_CHECKING:
    from deep_ep_core.nccl import Communicator

__all__ = [
    "OPEN_DEVICE",
    "BackendName",
    "Closable",
    "DeviceOpener",
    "agreed_by_backend",
    "check_backend",
    "count_gpu_ranks",
    "open_together",
]

BackendName = Literal["auto", "collective", "device"]
"""What a buffer may be asked for."""

OPEN_DEVICE = "open the device backend"
"""The operation by which ranks agree to use the device backend: one of those that the owner's transport must know."""

# What stands in the way of the device backend, and not of the collective one.
_REFUSALS = (TransportError, TopologyError, CompileError, ConfigError)


class Closable(Protocol):
    """What holds something until it is closed."""

    def close(self) -> None:
        """Let go of what is held."""


_T = TypeVar("_T")
_Closable = TypeVar("_Closable", bound=Closable)


def check_backend(backend: object) -> None:
    """Check the name of a backend.

    Raises:
        ConfigError: It is none of those that there are.
    """
    if backend not in get_args(BackendName):
        raise ConfigError(f'backend must be "auto", "collective" or "device" (got {backend!r})')


def agreed_by_backend(backend: BackendName) -> list[AgreedField]:
    """The values of a choice that every rank must pass alike, or have alike."""
    names = get_args(BackendName)
    return [
        AgreedField(name="backend", value=names.index(backend), show=lambda value: str(names[value])),
        AgreedField(
            name="use of CUDA",
            value=int(torch.cuda.is_available()),
            show=lambda value: "has CUDA" if value else "has none",
        ),
    ]


class DeviceOpener:
    """Opens the device backend for one buffer, in two steps, where it is asked for or worth trying.

    Every rank must have passed the same `backend`, which `agreed_by_backend` sees to.

    Args:
        transport: Row exchanges of the group; its name is the owner's, for messages.
        device: Device of this rank.
        backend: What was asked for.
        timeout_s: How long the host waits for a rank.
        logger: Where the owner says which backend it uses, and why.

    Attributes:
        communicator: NCCL's communicator, once it is open; None before, and where the device backend is not to be used.
    """

    def __init__(
        self,
        transport: CollectiveTransport,
        device: torch.device,
        *,
        backend: BackendName,
        timeout_s: float,
        logger: logging.Logger,
    ) -> None:
        self._transport = transport
        self._device = device
        self._must_open = backend == "device"
        self._timeout_s = timeout_s
        self._logger = logger
        self._why_not = _reason_against(transport.group, backend)
        self.communicator: Communicator | None = None

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
            self.communicator = shared_communicator(self._transport.group, self._device, timeout_s=self._timeout_s)
        except _REFUSALS as error:
            if self._must_open:
                raise
            self._why_not = str(error)
            return
        remember_topology(self._transport.group, self.communicator.topology)

    def open_backend(self, make: Callable[[Communicator], _T]) -> _T | None:
        """Make the device backend where it is to be used.

        Args:
            make: Makes it, on all ranks or on none (`open_together`).

        Returns:
            What `make` returned; None where the collective backend is to be used, which the log says with the reason.

        Raises:
            TransportError, TopologyError, CompileError, ConfigError: The device backend was asked for, and cannot be
                opened.

        Collective: yes.
        """
        if self.communicator is not None:
            try:
                return make(self.communicator)
            except _REFUSALS as error:
                if self._must_open:
                    raise
                self._why_not = str(error)
                self.communicator = None
        self._logger.info("%s uses the collective backend: %s", self._transport.name, self._why_not)
        return None


def count_gpu_ranks(transport: CollectiveTransport, device: torch.device) -> int:
    """How many ranks of a group run on the GPU of this rank, this one included.

    Args:
        transport: Row exchanges of the group, with an operation `OPEN_DEVICE`.
        device: CUDA device of this rank.

    Collective: yes.
    """
    gpu = torch.cuda.get_device_properties(device)
    gpu_name = f"{getattr(gpu, 'uuid', '')} {gpu.name}"
    gpu_id = int.from_bytes(hashlib.sha256(gpu_name.encode()).digest()[:7], "little")
    operation = transport.begin(OPEN_DEVICE, [], [[gpu_id]] * transport.num_ranks)
    return sum(values[0] == gpu_id for values in operation.peer_values)


def open_together(
    transport: CollectiveTransport, make: Callable[[], _Closable], *, must: str = OPEN_DEVICE
) -> _Closable:
    """Make what the device backend needs on all ranks, or on none: none begins to use what another one lacks.

    Args:
        transport: Row exchanges of the group, with an operation `OPEN_DEVICE`.
        make: Makes it on this rank. It is closed again where another rank failed.
        must: What all ranks must do, for the message to those that could.

    Raises:
        TransportError: Another rank failed, or could not be heard.
        Whatever `make` raised on this rank, once the others have been told that it did.

    Collective: yes.
    """
    made: _Closable | None = None
    failure: Exception | None = None
    try:
        made = make()
    except Exception as error:
        # Told to the others before it is raised.
        failure = error
    try:
        ready = transport.begin(OPEN_DEVICE, [], [[int(failure is None)]] * transport.num_ranks)
    except TransportError as error:
        if made is not None:
            made.close()
        if failure is not None:
            raise failure from error
        raise
    if made is not None and all(values[0] for values in ready.peer_values):
        return made
    if made is not None:
        made.close()
    if failure is not None:
        raise failure
    missing = [rank for rank, values in enumerate(ready.peer_values) if not values[0]]
    raise TransportError(
        f"all ranks must {must} (got a failure on rank {', '.join(map(str, missing))}, seen on rank "
        f"{transport.rank}); the error of that rank says why"
    )


def _reason_against(group: dist.ProcessGroup, backend: BackendName) -> str | None:
    """Why the device backend is not even tried; the same on all ranks, which agree on what it depends on."""
    if backend == "collective":
        return 'backend="collective" was passed'
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if backend == "auto" and "cuda" not in dist.get_backend_config(group):
        return "the group has no CUDA backend"
    return None
