"""Owns the communicators that a process keeps: one for a group and a device, made once, for all who need one.

Making one takes about a second, and NCCL keeps memory for each.
"""

from __future__ import annotations

import weakref

import torch
import torch.distributed as dist

from deep_ep_core.nccl.communicator import Communicator

__all__ = ["shared_communicator"]

_TIMEOUT_S = 300.0
_shared: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[torch.device, Communicator]] = weakref.WeakKeyDictionary()


def shared_communicator(
    group: dist.ProcessGroup, device: torch.device, *, timeout_s: float = _TIMEOUT_S
) -> Communicator:
    """The communicator of a group on a device. Who gets it does not close it: it goes with the group, or the process.

    Args:
        group: Any `torch.distributed` group.
        device: CUDA device of this rank, with its index.
        timeout_s: How long to wait for the other ranks where it has to be made.

    Raises:
        TransportError, RankMismatchError, CommTimeoutError: As `Communicator.open`.

    Collective: yes, the first time for a group and device, and again once torch has destroyed what it lent.
    """
    of_device = _shared.setdefault(group, {})
    found = of_device.get(device)
    if found is None or not found.is_alive:
        found = of_device[device] = Communicator.open(group, device, timeout_s=timeout_s)
    return found
