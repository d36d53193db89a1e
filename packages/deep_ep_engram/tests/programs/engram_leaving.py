"""Ranks that close one after the other, and when their parts go."""

from __future__ import annotations

import torch.distributed as dist

from deep_ep_core.transport import CollectiveTransport
from deep_ep_engram.collective import OPERATIONS
from deep_ep_engram.device.leaving import SharedLife, let_go_of_the_left


class Part:
    """Notes that it was closed."""

    def __init__(self, name: str, closed: list[str]) -> None:
        self.name, self.closed = name, closed

    def close(self) -> None:
        self.closed.append(self.name)


class Registry:
    """What stands for a communicator."""


def leave_in_turn() -> list[list[str]]:
    """Two tables, the second never closed by rank 0. Returns what this rank has closed after each step."""
    transport = CollectiveTransport(None, timeout_s=20.0, name="EngramTable", operations=OPERATIONS)
    registry, closed = Registry(), []
    steps: list[list[str]] = []
    lives = [SharedLife(transport, registry) for _ in range(2)]  # type: ignore[arg-type]
    for turn in range(dist.get_world_size()):
        if turn == dist.get_rank():
            lives[0].leave([Part("network", closed), Part("storage", closed)])
            if turn > 0:
                lives[1].leave([Part("other", closed)])
        dist.barrier()
        steps.append(list(closed))
    let_go_of_the_left(registry)  # type: ignore[arg-type]
    let_go_of_the_left(registry)  # type: ignore[arg-type]
    return [*steps, list(closed)]
