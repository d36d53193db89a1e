"""Owns the cases of the benchmark: which messages a step has, with the library and with torch's own calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist

from deep_ep_core.errors import DeepEPError
from deep_ep_pp.buffer import PipelineBuffer

__all__ = ["MODES", "OPS", "Case", "Mode", "Op", "Task", "busiest_device_bytes", "make_task"]

Op = Literal["ring", "both"]
"""`ring`: a message to the next rank and one from the previous. `both`: to and from both neighbours in the ring."""

Mode = Literal["stream", "host"]
"""`stream`: how long a step takes. `host`: how long its calls keep the host."""

OPS: tuple[Op, ...] = get_args(Op)
MODES: tuple[Mode, ...] = get_args(Mode)

# A message is copied into a slot and out of it, and a copy reads and writes.
_PASSES_AT_SENDER, _PASSES_AT_RECEIVER = 1, 3
# Other values than the last bytes of any rank's number.
_EMPTY = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is measured.

    Attributes:
        op: Which messages a step has.
        mode: What is timed.
        message_bytes: Size of a message, which is one tensor.
        window: Messages that may be on their way between two ranks.
    """

    op: Op
    mode: Mode
    message_bytes: int
    window: int

    def destinations(self, rank: int, num_ranks: int) -> list[int]:
        """Where a rank sends to in a step, in this order."""
        neighbours = [(rank + 1) % num_ranks]
        return neighbours if self.op == "ring" else [*neighbours, (rank - 1) % num_ranks]

    def sources(self, rank: int, num_ranks: int) -> list[int]:
        """Where a rank receives from in a step, in this order: that of its sources' destinations."""
        neighbours = [(rank - 1) % num_ranks]
        return neighbours if self.op == "ring" else [*neighbours, (rank + 1) % num_ranks]


def busiest_device_bytes(case: Case, device_of_rank: list[str]) -> int:
    """What a step reads and writes in the memory of the busiest device, at least, by way of slots.

    A message is read at its sender; at its receiver it is written into a slot, read there and written to its tensor.

    Args:
        case: The case.
        device_of_rank: A name for the device of each rank.
    """
    num_ranks = len(device_of_rank)
    moved = dict.fromkeys(device_of_rank, 0)
    for rank, device in enumerate(device_of_rank):
        num_messages = len(case.destinations(rank, num_ranks))
        moved[device] += num_messages * (_PASSES_AT_SENDER + _PASSES_AT_RECEIVER) * case.message_bytes
    return max(moved.values())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """The steps of a case on one rank. All are collective.

    Attributes:
        run: A step with the library.
        run_baseline: The same with `torch.distributed.batch_isend_irecv`.
        check: Raises where what a step received is not what was sent, and empties the tensors for the next check.
    """

    run: Callable[[], object]
    run_baseline: Callable[[], object]
    check: Callable[[str], None]


def make_task(case: Case, buffer: PipelineBuffer, device: torch.device) -> Task:
    """Make the tensors of a case, and the steps on them.

    Args:
        case: The case.
        buffer: Configured for its messages.
        device: Where tensors lie.
    """
    rank, num_ranks, group = buffer.rank_idx, buffer.num_ranks, buffer.group
    destinations, sources = case.destinations(rank, num_ranks), case.sources(rank, num_ranks)
    sent = torch.full((case.message_bytes,), rank % _EMPTY, dtype=torch.uint8, device=device)
    received = [torch.full_like(sent, _EMPTY) for _ in sources]

    def run() -> None:
        for dst in destinations:
            buffer.pp_send(sent, dst)
        for tensor, src in zip(received, sources, strict=True):
            buffer.pp_recv(tensor, src)

    def run_baseline() -> None:
        sends = [dist.P2POp(dist.isend, sent, group=group, group_peer=dst) for dst in destinations]
        recvs = [
            dist.P2POp(dist.irecv, tensor, group=group, group_peer=src)
            for tensor, src in zip(received, sources, strict=True)
        ]
        for work in dist.batch_isend_irecv(sends + recvs):
            work.wait()

    def check(whose: str) -> None:
        for tensor, src in zip(received, sources, strict=True):
            if not bool((tensor == src % _EMPTY).all()):
                raise DeepEPError(
                    f"{whose} must bring every byte of a message (got others from rank {src}, {case}, on rank {rank}); "
                    "times of a wrong result are worth nothing. Please report it, with the command"
                )
            tensor.fill_(_EMPTY)

    return Task(run=run, run_baseline=run_baseline, check=check)
