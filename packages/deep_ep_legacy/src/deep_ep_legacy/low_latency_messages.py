"""Owns messages that one call posts and a later one waits for: the transport of low-latency payloads.

`deep_ep_core.transport` waits in the call that sends. Here a peer can also be given up: what is still under way then
stays so, and no other peer's messages suffer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["LatePeers", "PendingMessages", "Waited", "wire_device"]

_POLL_S = 20e-6
# The backend breaks every connection with work under way when a wait of its own expires. This one never does.
_FOREVER = timedelta(days=365)


class LatePeers(Exception):  # noqa: N818  # not an error yet: the caller knows what it means
    """Messages of these peers did not arrive. `cause` is what the group's backend said."""

    def __init__(self, peers: Sequence[int], cause: BaseException) -> None:
        super().__init__(str(cause))
        self.peers = sorted(peers)
        self.cause = cause


@dataclass(slots=True, kw_only=True)
class Waited:
    """What a wait came to.

    Attributes:
        wait_ns: Time spent waiting for each peer, by rank.
        given_up: Peers whose messages may still be missing.
    """

    wait_ns: dict[int, int] = field(default_factory=dict)
    given_up: set[int] = field(default_factory=set)


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
    """Messages to and from some peers, under way once this is made. An empty tensor is no message.

    Args:
        group: The ranks.
        peers: Those to exchange with, this rank not among them.
        sends: By rank, the messages for each, contiguous, on the wire's device.
        recvs: Likewise, where the messages of each are received.
        tag: The same on both sides; messages of another tag are not mistaken for these, where the backend has tags.
        may_give_up: Whether a late peer is given up rather than raised, which takes a backend of the CPU.

    Raises:
        LatePeers: A peer is gone.

    Collective: yes, between each two ranks that exchange.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        peers: Sequence[int],
        sends: Sequence[Sequence[torch.Tensor]],
        recvs: Sequence[Sequence[torch.Tensor]],
        tag: int,
        may_give_up: bool,
    ) -> None:
        ops = [
            dist.P2POp(call, message, group=group, tag=tag, group_peer=peer)
            for call, messages in ((dist.irecv, recvs), (dist.isend, sends))
            for peer in peers
            for message in messages[peer]
            if message.numel()
        ]
        self._is_on_cpu = all(op.tensor.device.type == "cpu" for op in ops)
        self._may_give_up = may_give_up and self._is_on_cpu
        self._waited = Waited()
        # The operations also keep the memory of the messages alive. On the CPU there is one of `_works` for each.
        self._ops: list[dist.P2POp] = []
        self._works: list[Any] = []
        # A device's backend wants all at once; elsewhere one by one tells which peer is gone.
        for batch in [[op] for op in ops] if self._is_on_cpu else [ops]:
            if batch[0].group_peer not in self._waited.given_up:
                self._post(batch)

    def _post(self, ops: list[dist.P2POp]) -> None:
        try:
            self._works += dist.batch_isend_irecv(ops)
            self._ops += ops
        except RuntimeError as error:
            self._give_up_or_raise(ops, error)

    def wait(self, timeout_s: float) -> Waited:
        """Return when all messages have arrived, or their peers are given up.

        Args:
            timeout_s: How long to wait from now.

        Raises:
            LatePeers: A peer died or did not send in time, and may not be given up.

        Collective: no: whatever a peer does after it has posted its messages, they arrive.
        """
        deadline = time.monotonic() + timeout_s
        if self._is_on_cpu:
            self._wait_for_each(deadline)
        else:
            self._wait_for_device(deadline)
        return self._waited

    def _wait_for_each(self, deadline: float) -> None:
        waited = self._waited
        for op, work in zip(self._ops, self._works, strict=True):
            peer = op.group_peer
            assert peer is not None
            if peer in waited.given_up:
                continue
            start_ns = time.monotonic_ns()
            try:
                # 1 ms at least: a zero would mean "no timeout".
                _wait(work, max(deadline - time.monotonic(), 1e-3), in_thread=self._may_give_up)
            except RuntimeError as error:
                self._give_up_or_raise([op], error)
            waited.wait_ns[peer] = waited.wait_ns.get(peer, 0) + time.monotonic_ns() - start_ns
        # What is left may still arrive, so its memory stays.
        left = [pair for pair in zip(self._ops, self._works, strict=True) if pair[0].group_peer in waited.given_up]
        self._ops, self._works = [op for op, _ in left], [work for _, work in left]

    def _wait_for_device(self, deadline: float) -> None:
        start_ns = time.monotonic_ns()
        try:
            # On the host, since a wait in the stream has no deadline.
            while not all(work.is_completed() for work in self._works):
                if time.monotonic() > deadline:
                    raise TimeoutError("messages were still missing when the time was over")
                time.sleep(_POLL_S)
            for work in self._works:
                work.wait()
        except (RuntimeError, TimeoutError) as error:
            self._give_up_or_raise(self._ops, error)
        wait_ns = time.monotonic_ns() - start_ns
        self._waited.wait_ns = {op.group_peer: wait_ns for op in self._ops if op.group_peer is not None}
        self._ops, self._works = [], []

    @property
    def is_left(self) -> bool:
        """Whether messages that were given up may still arrive; keep this object then."""
        return bool(self._works)

    def _give_up_or_raise(self, ops: Sequence[dist.P2POp], error: BaseException) -> None:
        peers = {op.group_peer for op in ops if op.group_peer is not None}
        if not self._may_give_up:
            raise LatePeers(sorted(peers), error) from error
        self._waited.given_up |= peers


def _wait(work: Any, timeout_s: float, *, in_thread: bool) -> None:
    if not in_thread:
        work.wait(timedelta(seconds=timeout_s))
        return
    errors: list[RuntimeError] = []

    def target() -> None:
        try:
            work.wait(_FOREVER)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=target, name="deep-ep-low-latency-wait", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise RuntimeError("messages were still missing when the time was over")
    if errors:
        raise errors[0]
