"""Owns what every backend knows of a buffer's messages: their numbers, what ranks agree on, who is late, what failed.

It moves no message.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deep_ep_core.errors import CommTimeoutError, ConfigError, TransportError
from deep_ep_core.refusals import rejected
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_pp.late_peer import LatePeers
from deep_ep_pp.sizing import PipelineConfig

__all__ = ["PP_SET_CONFIG", "Ledger"]

PP_SET_CONFIG = "pp_set_config"
"""The operation by which ranks take a configuration: one of those that the buffer's transport must know."""

# Buffers are made in the same order on every rank, so a count per group gives each the same number everywhere.
_num_buffers: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


class Ledger:
    """What one rank knows of the messages of a buffer.

    Args:
        transport: The group's transport, for what all ranks do together.

    Attributes:
        transport: As passed.
        number: Number of the buffer among those of its group, the same on every rank.
        store: A space of the buffer's own in the group's store.
        num_sent: Messages that this rank has sent, by destination.
        num_received: Messages that this rank has received, by source.
        has_failed: Whether a call has failed; then every later one does.

    Collective: the constructor makes no call; every rank makes its ledgers in the same order.
    """

    def __init__(self, transport: CollectiveTransport) -> None:
        self.transport = transport
        self.number = next(_num_buffers[transport.group.group_name])
        self.store = prefixed(transport.group.get_group_store(), f"deep_ep_pp/{self.number}")
        self.num_sent = [0] * transport.num_ranks
        self.num_received = [0] * transport.num_ranks
        self._late_peers = LatePeers(
            self.store, rank=transport.rank, num_ranks=transport.num_ranks, timeout_s=transport.timeout_s
        )
        self._failure: CommTimeoutError | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a call has failed; then every later one does."""
        return self._failure is not None

    @property
    def wait_s(self) -> float:
        """How long a call may wait for a peer, in seconds: the rest of the timeout is for the question who is late."""
        return self.transport.timeout_s - self._late_peers.search_s

    def begin(self) -> float:
        """Look whether a call can be made; returns its deadline, as `time.monotonic` counts.

        Raises:
            TransportError: An earlier call failed.
        """
        if self._failure is not None:
            raise TransportError(
                f"{self.transport.name} cannot be used on rank {self.transport.rank} after a failed operation "
                f"({self._failure}); make a new process group and a new buffer"
            ) from self._failure
        self._late_peers.withdraw_rejection()
        return time.monotonic() + self.wait_s

    def next_send(self, dst: int) -> str:
        """What the next send to a rank is called."""
        return f"pp_send #{self.num_sent[dst] + 1} to rank {dst}"

    def next_recv(self, src: int) -> str:
        """What the next receive from a rank is called."""
        return f"pp_recv #{self.num_received[src] + 1} from rank {src}"

    def agree(self, config: PipelineConfig) -> None:
        """Learn that all ranks bring the same configuration, and that every message was received.

        Raises:
            RankMismatchError: Ranks passed different arguments.
            ConfigError: A message was sent and not received; raised on every rank.
            CommTimeoutError: A rank did not take part.

        Collective: yes.
        """
        transport = self.transport
        try:
            operation = transport.begin(
                PP_SET_CONFIG,
                [
                    AgreedField(name="num_max_tensor_bytes", value=config.num_max_tensor_bytes),
                    AgreedField(name="num_max_inflight_tensors", value=config.num_max_inflight_tensors),
                ],
            )
            # All ranks see the counts of all, so that all come to the same result.
            ones = [1] * transport.num_ranks
            mine = torch.tensor([self.num_sent + self.num_received] * transport.num_ranks, device="cpu")
            counts = operation.exchange_rows(mine, ones, ones, "message counts")
        except CommTimeoutError as error:
            self._failure = error
            self._late_peers.report_failure(PP_SET_CONFIG, error.peers[0])
            raise
        sent, received = counts.split(transport.num_ranks, dim=1)
        undelivered = (sent - received.T).nonzero().tolist()
        if undelivered:
            src, dst = undelivered[0]
            raise ConfigError(
                f"every message must be received before pp_set_config (got {sent[src, dst]} sent by rank {src} to rank "
                f"{dst}, which received {received[dst, src]}; seen on rank {transport.rank}); nothing was changed, "
                "receive them and call again"
            )

    def other_sizes(self, operation: str, sizes: list[int], given: list[int], remedy: str) -> ConfigError:
        """The error for tensors of other sizes than the message's.

        Args:
            operation: The receive.
            sizes: Bytes of each tensor that was sent.
            given: Bytes of each tensor to receive into.
            remedy: What became of the message, and what to do.
        """
        must = f"{operation} must be given tensors of the message's sizes, {sizes} bytes"
        return rejected(self.transport.rank, must, given, remedy)

    def report_rejection(self, operation: str, reason: str) -> None:
        """Tell the peers that this rank refuses an operation. Never raises."""
        if self._failure is None:
            self._late_peers.report_rejection(operation, reason)
            if operation == PP_SET_CONFIG:
                self.transport.report_rejection(operation, reason)

    def fail(self, operation: str, peer: int, cause: BaseException) -> NoReturn:
        """Find out who is late, and raise the error that names them; every later call fails.

        Args:
            operation: What this rank waited in.
            peer: The rank at its other end.
            cause: What the wait ended with.
        """
        self._failure = self._late_peers.failure(operation, peer, cause)
        # For peers that wait for this rank together with all others.
        self.transport.report_rejection(operation, f"{operation} failed: {self._failure}")
        raise self._failure from cause


def prefixed(store: Any, prefix: str) -> Any:
    """A space of its own in a store."""
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # public, but not in __all__
