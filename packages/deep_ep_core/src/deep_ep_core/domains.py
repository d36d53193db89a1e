"""Owns finding the physical domains of a process group: which of its ranks share a machine.

The answer is found once for a group and kept. Where NCCL runs the group's kernels, its own teams take precedence: who
opens a communicator has them remembered.
"""

from __future__ import annotations

import hashlib
import weakref

import torch.distributed as dist

from deep_ep_core.env import get_env
from deep_ep_core.topology import Topology, host_identity, scaleup_size_from_hosts
from deep_ep_core.transport import AgreedField, CollectiveTransport

__all__ = ["detect_topology", "remember_topology"]

_OPERATION = "find domains"
_TIMEOUT_S = 300.0
_known: weakref.WeakKeyDictionary[dist.ProcessGroup, Topology] = weakref.WeakKeyDictionary()


def detect_topology(group: dist.ProcessGroup | None, *, timeout_s: float = _TIMEOUT_S) -> Topology:
    """Where this rank stands among the machines of its group.

    Ranks of one machine form a scale-up domain; `NCCL_LSA_TEAM_SIZE` makes the domains smaller.

    Args:
        group: Any `torch.distributed` group, or None for the default group.
        timeout_s: How long to wait for the other ranks.

    Raises:
        ConfigError: `torch.distributed` is not initialised, or this process is not in the group.
        TopologyError: `NCCL_LSA_TEAM_SIZE` does not divide the ranks.
        RankMismatchError: `NCCL_LSA_TEAM_SIZE` differs between ranks.
        CommTimeoutError: A rank did not take part.

    Collective: yes, the first time for a group; later calls answer from memory.
    """
    # Looked up first: the transports of a group are counted, and a rank that asks more often must count no more.
    member = dist.group.WORLD if group is None else group
    if isinstance(member, dist.ProcessGroup) and member in _known:
        return _known[member]
    transport = CollectiveTransport(group, timeout_s=timeout_s, name="the search for domains", operations=[_OPERATION])
    team_size = get_env().nccl_lsa_team_size
    digest = hashlib.sha256(host_identity().encode()).digest()
    host = int.from_bytes(digest[:7], "little")
    operation = transport.begin(
        _OPERATION,
        [AgreedField(name="NCCL_LSA_TEAM_SIZE", value=team_size or 0, show=lambda value: str(value or "unset"))],
        [[host]] * transport.num_ranks,
    )
    hosts = [str(values[0]) for values in operation.peer_values]
    topology = Topology(
        rank=transport.rank,
        num_ranks=transport.num_ranks,
        num_scaleup_ranks=scaleup_size_from_hosts(hosts, team_size),
    )
    _known[transport.group] = topology
    return topology


def remember_topology(group: dist.ProcessGroup, topology: Topology) -> None:
    """Let `detect_topology` answer with what NCCL says of a group. Collective: no, but all ranks must do it."""
    _known[group] = topology
