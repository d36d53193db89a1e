"""Searches for the physical domains of groups, by ranks that stand on make-believe hosts."""

from __future__ import annotations

import os

import torch.distributed as dist
from core_exchanges import make_transport

from deep_ep_core import domains
from deep_ep_core.domains import detect_topology
from deep_ep_core.env import reset_env
from deep_ep_core.topology import Topology


def detect(members: list[int] | None = None) -> Topology | None:
    """The topology of a group that nobody has asked about, of all ranks unless members are given."""
    group = dist.new_group(members)
    topology = None
    if members is None or dist.get_rank() in members:
        topology = detect_topology(group, timeout_s=60.0)
    dist.destroy_process_group(group)
    return topology


def detect_on_hosts(hosts: str) -> Topology | None:
    """Each rank takes its host's name from its place in the text."""
    identity = domains.host_identity
    domains.host_identity = lambda: hosts[dist.get_rank()]
    try:
        return detect()
    finally:
        domains.host_identity = identity


def detect_with_team_sizes(team_sizes: list[int | None]) -> Topology | None:
    """Each rank finds its own NCCL_LSA_TEAM_SIZE in its environment."""
    before = os.environ.pop("NCCL_LSA_TEAM_SIZE", None)
    size = team_sizes[dist.get_rank()]
    if size is not None:
        os.environ["NCCL_LSA_TEAM_SIZE"] = str(size)
    reset_env()
    try:
        return detect()
    finally:
        os.environ.pop("NCCL_LSA_TEAM_SIZE", None)
        if before is not None:
            os.environ["NCCL_LSA_TEAM_SIZE"] = before
        reset_env()


def detect_default_group() -> tuple[Topology, bool]:
    """By both of its names; returns also whether the second answer was the first one again."""
    topology = detect_topology(None)
    return topology, detect_topology(dist.group.WORLD) is topology


def ask_again_alone() -> int:
    """Only rank 0 asks again, and again; the transports made afterwards must still belong together on all ranks.

    Returns the number of the operation that they then have in common.
    """
    group = dist.new_group()
    first = detect_topology(group, timeout_s=60.0)
    if dist.get_rank() == 0:
        for _ in range(3):
            assert detect_topology(group, timeout_s=60.0) is first
    operation = make_transport(group).begin("move", [])
    dist.destroy_process_group(group)
    return operation.idx


def detect_outside(members: list[int]) -> str:
    """What a process outside a group is told."""
    group = dist.new_group(members)
    try:
        detect_topology(group, timeout_s=60.0)
        told = "nothing"
    except ValueError as error:
        told = f"{type(error).__name__}: {error}"
    dist.destroy_process_group(group)
    return told
