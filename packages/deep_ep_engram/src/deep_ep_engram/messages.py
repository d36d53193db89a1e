"""Owns messages that are under way between the ranks: posted by one call, waited for by a later one.

`deep_ep_core.transport` waits in the call that sends, which is right for what must be known at once. A group's ranks
must post in one order; the operation that opens each fetch makes sure of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deep_ep_core.errors import CommTimeoutError

__all__ = ["PendingMessages", "wire_device"]

# Keeps these messages apart from the user's own, and from those of the transport.
_TAG = 0x0E16
_POLL_S = 20e-6


def wire_device(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where the group sends tensors of `device` from; `CollectiveTransport` has made sure that there is a way."""
    config = dist.get_backend_config(group)
    backends = dict(pair.split(":") for pair in config.split(",") if ":" in pair)
    backend = backends.get(device.type)
    # gloo claims CUDA too, but its point-to-point messages take host memory only.
    if backend is not None and (device.type == "cpu" or backend != "gloo"):
        return device
    return torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())


class PendingMessages:
    """One message to each peer and one from each, under way once this is made. An empty tensor is no message.

    Args:
        group: The ranks.
        sends: What each rank is sent, by rank; contiguous, on the wire's device. The own entry is left alone.
        recvs: Where the message of each rank is received, likewise.
        phase: What is under way, for messages.

    Raises:
        CommTimeoutError: A peer is gone.

    Collective: yes.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, sends: Sequence[torch.Tensor], recvs: Sequence[torch.Tensor], phase: str
    ) -> None:
        self._phase = phase
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        # Start with the next rank, so that the ranks do not all send to rank 0 first.
        peers = [(self._rank + shift) % self._num_ranks for shift in range(1, self._num_ranks)]
        ops = [dist.P2POp(dist.irecv, recvs[peer], group=group, tag=_TAG, group_peer=peer) for peer in peers]
        ops += [dist.P2POp(dist.isend, sends[peer], group=group, tag=_TAG, group_peer=peer) for peer in peers]
        # Also what keeps the memory of the messages alive.
        self._ops = [op for op in ops if op.tensor.numel()]
        self._works: list[Any] = []
        self._is_on_cpu = all(op.tensor.device.type == "cpu" for op in self._ops)
        # A device's backend wants all at once; elsewhere one by one tells which peer is gone.
        batches = [[op] for op in self._ops] if self._is_on_cpu else [self._ops]
        for batch in batches:
            try:
                self._works += dist.batch_isend_irecv(batch)
            except RuntimeError as error:
                self._fail(batch, error)

    def wait(self, timeout_s: float) -> None:
        """Return when all messages have arrived, and let their memory go.

        Args:
            timeout_s: How long to wait from now.

        Raises:
            CommTimeoutError: A peer died or did not send in time.

        Collective: no: whatever a peer does after it has posted its messages, they arrive.
        """
        deadline = time.monotonic() + timeout_s
        waiting_for = self._ops
        try:
            if not self._is_on_cpu:
                # On the host, since a wait in the stream has no deadline.
                while not all(work.is_completed() for work in self._works):
                    if time.monotonic() > deadline:
                        raise TimeoutError("messages were still missing when the time was over")
                    time.sleep(_POLL_S)
                for work in self._works:
                    work.wait()
            else:
                for op, work in zip(self._ops, self._works, strict=True):
                    waiting_for = [op]
                    # 1 ms at least: a zero would mean "no timeout".
                    work.wait(timedelta(seconds=max(deadline - time.monotonic(), 1e-3)))
        except (RuntimeError, TimeoutError) as error:
            self._fail(waiting_for, error)
        self._ops, self._works = [], []

    def _fail(self, waiting_for: Sequence[dist.P2POp], cause: BaseException) -> NoReturn:
        peers = sorted({op.group_peer for op in waiting_for})
        who = f"rank {peers[0]}" if len(peers) == 1 else f"one of ranks {', '.join(map(str, peers))}"
        raise CommTimeoutError(
            f"every rank must send the entries that others fetched, but {who} did not in {self._phase} (seen on rank "
            f"{self._rank} of {self._num_ranks}); the group's backend said: {str(cause).strip()}; look at that rank's "
            "own output first; a slow rank needs a longer num_cpu_timeout_secs",
            phase=self._phase,
            rank=self._rank,
            peers=peers,
        ) from cause
