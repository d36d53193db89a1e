"""Owns the way from an MPI communicator to a `torch.distributed` group of the same ranks.

It calls the communicator's mpi4py-style methods only, and imports no MPI.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from deep_ep_core.errors import ConfigError
from deep_ep_core.topology import host_identity

__all__ = ["MpiCommunicator", "group_of_communicator"]


@runtime_checkable
class MpiCommunicator(Protocol):
    """The methods of an mpi4py communicator that are used."""

    def Get_rank(self) -> int:  # noqa: N802
        """This process among those of the communicator."""

    def Get_size(self) -> int:  # noqa: N802
        """Number of processes."""

    def allgather(self, sendobj: Any) -> list[Any]:
        """What each process passed, by rank."""


def group_of_communicator(comm: MpiCommunicator, *, timeout_s: float) -> dist.ProcessGroup:
    """A process group of the communicator's ranks, in their order.

    Where `torch.distributed` is initialised, it is the default group or a new group of it. Where it is not, its default
    group is initialised with gloo, so that a program of MPI needs no other launcher; it stays when the buffer goes.

    Args:
        comm: The communicator.
        timeout_s: How long to wait for the other ranks.

    Raises:
        ConfigError: `torch.distributed` is initialised on some ranks only, or orders the ranks in another way.

    Collective: yes, over `comm`.
    """
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    places = comm.allgather(dist.get_rank() if dist.is_initialized() else None)
    if all(place is None for place in places):
        _start_default_group(comm, timeout_s=timeout_s)
    elif None in places or places != sorted(set(places)):
        raise ConfigError(
            "torch.distributed must be initialised on all ranks of comm, which it orders as comm does, or on none (got "
            f"its ranks {places} by rank of comm, on rank {rank}); initialise it for all of them, and pass its group"
        )
    elif num_ranks < dist.get_world_size():
        group = dist.new_group(places, timeout=timedelta(seconds=timeout_s), use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup), "this process is one of them"
        return group
    group = dist.group.WORLD
    assert group is not None
    return group


def _start_default_group(comm: MpiCommunicator, *, timeout_s: float) -> None:
    rank, num_ranks, timeout = comm.Get_rank(), comm.Get_size(), timedelta(seconds=timeout_s)
    is_one_machine = len(set(comm.allgather(host_identity()))) == 1
    host = "127.0.0.1" if is_one_machine else socket.gethostname()
    store = None
    if rank == 0:
        store = TCPStore(host, 0, num_ranks, is_master=True, timeout=timeout, wait_for_workers=False)
    # The port is the system's choice, so rank 0 tells it.
    host, port = comm.allgather((host, 0 if store is None else store.port))[0]
    if store is None:
        store = TCPStore(host, port, num_ranks, is_master=False, timeout=timeout, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
