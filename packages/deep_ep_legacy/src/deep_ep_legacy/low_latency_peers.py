"""Owns who takes part in low-latency calls: how ranks agree on one, who is masked, and what a failure leads to.

Without masks all ranks open each call through `deep_ep_core.transport`, which names a disagreement or a late rank. With
masks (`enable_shrink`) each two ranks speak for themselves, so that one which is gone keeps nobody waiting. It does not
know what a call moves.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError, TransportError
from deep_ep_core.transport import AgreedField, CollectiveTransport
from deep_ep_legacy.low_latency_messages import LatePeers, PendingMessages, wire_device

__all__ = ["OPERATIONS", "Call", "Peers"]

OPERATIONS = ("low_latency_dispatch", "low_latency_combine", "clean_low_latency_buffer")
"""The names of all low-latency operations, for the transport that a session is given."""

_logger = logging.getLogger("deep_ep_legacy")

# Keeps these messages apart from the user's own and from the transport's. The numbers of the session and of the call
# are added, so that what a rank sent while it was masked is never taken for something newer.
_FIRST_TAG = 0x11000000
_NUM_SESSION_TAGS = 1 << 12
_NUM_CALL_TAGS = 1 << 12
# Sessions are made in the same order on every rank, so a count per group gives each the same number everywhere.
_num_sessions: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)
_MAX_FIELDS = 12
_MAX_VALUES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call that the ranks have agreed upon.

    Attributes:
        name: Its name and number, for messages.
        tag: Tag of its messages.
        peers: The other ranks that take part, the next one first.
        values: What each rank sent to this rank, by rank; None for one that takes no part.
    """

    name: str
    tag: int
    peers: tuple[int, ...]
    values: tuple[tuple[int, ...] | None, ...]


class Peers:
    """The ranks of a session, as this rank sees them.

    Args:
        transport: The group's transport; its operations include `OPERATIONS`.
        enable_shrink: Keep a mask of ranks that take no part; a late rank is then masked instead of raised.

    Attributes:
        transport: As above.
        mask: By rank, whether it is masked; None without `enable_shrink`.
    """

    def __init__(self, transport: CollectiveTransport, *, enable_shrink: bool) -> None:
        self.transport = transport
        self.mask: list[bool] | None = [False] * transport.num_ranks if enable_shrink else None
        session = next(_num_sessions[transport.group.group_name]) % _NUM_SESSION_TAGS
        self._first_tag = _FIRST_TAG + session * _NUM_CALL_TAGS
        self._num_calls = 0
        self._failure: CommTimeoutError | None = None
        # Messages of peers that were given up, which may still arrive.
        self._left: list[PendingMessages] = []

    @property
    def has_failed(self) -> bool:
        """Whether messages may be missing for good."""
        return self._failure is not None

    def active(self) -> list[bool]:
        """By rank, whether it takes part."""
        return [not is_masked for is_masked in self.mask or [False] * self.transport.num_ranks]

    def open(self, name: str, fields: Sequence[AgreedField], values: Sequence[Sequence[int]] | None = None) -> Call:
        """Open a call: tell each peer what this rank was called with, and hear the same.

        Args:
            name: One of `OPERATIONS`.
            fields: What the ranks must pass alike.
            values: `[num_ranks, n]`, n <= 4: integers for each rank.

        Raises:
            RankMismatchError: Ranks disagree; raised on every rank that takes part.
            CommTimeoutError: A peer did not arrive, and there is no mask.

        Collective: yes.
        """
        transport = self.transport
        if self._failure is not None:
            raise TransportError(
                f"{transport.name} cannot make low-latency calls on rank {transport.rank} after a failed one "
                f"({self._failure}); make a new process group and a new buffer"
            ) from self._failure
        values = [[]] * transport.num_ranks if values is None else values
        tag = self._first_tag + self._num_calls % _NUM_CALL_TAGS
        self._num_calls += 1
        if self.mask is None:
            operation = transport.begin(name, fields, values)
            heard = tuple(tuple(row) for row in operation.peer_values)
            return Call(name=operation.name, tag=tag, peers=self._active_peers(), values=heard)
        return self._open_among_unmasked(name, tag, fields, values)

    def _active_peers(self) -> tuple[int, ...]:
        num_ranks, me, active = self.transport.num_ranks, self.transport.rank, self.active()
        # Start with the next rank, so that the ranks do not all send to rank 0 first.
        order = [(me + shift) % num_ranks for shift in range(1, num_ranks)]
        return tuple(peer for peer in order if active[peer])

    def _open_among_unmasked(
        self, name: str, tag: int, fields: Sequence[AgreedField], values: Sequence[Sequence[int]]
    ) -> Call:
        transport, number = self.transport, self._num_calls
        num_values = len(values[0])
        assert len(fields) <= _MAX_FIELDS, (name, len(fields))
        assert num_values <= _MAX_VALUES, (name, num_values)
        headers = torch.zeros(transport.num_ranks, 1 + _MAX_FIELDS + _MAX_VALUES, dtype=torch.int64)
        headers[:, 0] = zlib.crc32(name.encode())
        headers[:, 1 : 1 + len(fields)] = torch.tensor([field.value for field in fields], dtype=torch.int64)
        headers[:, -_MAX_VALUES:][:, :num_values] = torch.tensor(values, dtype=torch.int64)
        device = wire_device(transport.group, headers.device)
        heard_on_wire = torch.zeros_like(headers, device=device)
        call = Call(name=f"{name} #{number}", tag=tag, peers=self._active_peers(), values=())
        self.wait(self.post(call, [headers.to(device).unbind()], [heard_on_wire.unbind()]), call, "arguments")
        heard, active = heard_on_wire.tolist(), self.active()
        names = {zlib.crc32(operation.encode()): operation for operation in OPERATIONS}
        checks = [AgreedField(name="operation", value=0, show=lambda code: names.get(code, str(code))), *fields]
        for column, field in enumerate(checks):
            shown = [
                field.show(row[column]) if is_active else "masked" for row, is_active in zip(heard, active, strict=True)
            ]
            if len({text for text, is_active in zip(shown, active, strict=True) if is_active}) > 1:
                listed = ", ".join(f"rank {rank}: {text}" for rank, text in enumerate(shown))
                raise RankMismatchError(
                    f"every rank of the group must call {transport.name} with the same {field.name} (got {listed}; "
                    f"seen in {call.name} on rank {transport.rank}); nothing was sent, make the ranks agree and call "
                    "again",
                    field=field.name,
                    values=shown,
                )
        return Call(
            name=call.name,
            tag=tag,
            peers=self._active_peers(),
            values=tuple(
                tuple(row[-_MAX_VALUES:][:num_values]) if is_active else None
                for row, is_active in zip(heard, active, strict=True)
            ),
        )

    def post(
        self,
        call: Call,
        sends: Sequence[Sequence[torch.Tensor]],
        recvs: Sequence[Sequence[torch.Tensor]],
    ) -> PendingMessages:
        """Begin to exchange parts of a call; own messages are copied.

        Args:
            call: The call.
            sends: Of each part, by rank: what is sent to it. On the device that `wire_device` gives, contiguous.
            recvs: Likewise, what is received.

        Collective: yes.
        """
        me, group = self.transport.rank, self.transport.group
        for sent, received in zip(sends, recvs, strict=True):
            received[me].copy_(sent[me])
        # From parts by rank to ranks by part.
        by_rank = [[part[rank] for part in sends] for rank in range(self.transport.num_ranks)]
        into = [[part[rank] for part in recvs] for rank in range(self.transport.num_ranks)]
        try:
            return PendingMessages(
                group, peers=call.peers, sends=by_rank, recvs=into, tag=call.tag, may_give_up=self.mask is not None
            )
        except LatePeers as late:
            raise self._failed(call, "payload", late) from late

    def wait(self, messages: PendingMessages, call: Call, phase: str) -> dict[int, int]:
        """Wait for messages; afterwards late peers are masked.

        Args:
            messages: From `post`.
            call: Their call.
            phase: What they bring, for messages.

        Returns:
            Nanoseconds spent waiting for each peer, by rank.

        Raises:
            CommTimeoutError: A peer died or is late, and there is no mask.
        """
        try:
            waited = messages.wait(self.transport.timeout_s)
        except LatePeers as late:
            raise self._failed(call, phase, late) from late
        if messages.is_left:
            self._left.append(messages)
        for peer in sorted(waited.given_up):
            assert self.mask is not None
            self.mask[peer] = True
            _logger.warning(
                "rank %d did not send its %s of %s within %g s, so rank %d masks it and goes on without",
                peer,
                phase,
                call.name,
                self.transport.timeout_s,
                self.transport.rank,
            )
        return waited.wait_ns

    def _failed(self, call: Call, phase: str, late: LatePeers) -> CommTimeoutError:
        """Note that messages may be missing for good, and tell the peers that will wait for this rank why."""
        transport = self.transport
        who = f"rank {late.peers[0]}" if len(late.peers) == 1 else f"one of ranks {', '.join(map(str, late.peers))}"
        error = CommTimeoutError(
            f"every rank must send its {phase} within {transport.timeout_s:g} s, but {who} did not in {call.name} "
            f"(seen on rank {transport.rank} of {transport.num_ranks}); the group's backend said: {late}; look at that "
            "rank's own output first",
            phase=f"{transport.name}: {call.name}: {phase}",
            rank=transport.rank,
            peers=late.peers,
        )
        self._failure = self._failure or error
        transport.report_rejection(call.name, str(error))
        return error

    @contextlib.contextmanager
    def rejections_reported(self, name: str) -> Iterator[None]:
        """Let the peers know why this rank does not come, when it refuses its own arguments."""
        try:
            yield
        except RankMismatchError:
            raise
        except ConfigError as error:
            self.transport.report_rejection(name, str(error))
            raise
