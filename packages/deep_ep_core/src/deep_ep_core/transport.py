"""Owns the collective transport: row exchanges between the ranks of any `torch.distributed` group, with deadlines.

Every operation opens with one small message to each peer, which carries the arguments that ranks must agree on; a
disagreement is named on every rank before any payload moves. A peer that dies or is late is named within the timeout.
It does not know what the rows mean, and moves bytes only: any dtype arrives as it was sent.
"""

from __future__ import annotations

import itertools
import math
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError, TransportError
from deep_ep_core.roll_call import RankReport, RollCall, describe_failure, find_culprits

__all__ = ["AgreedField", "CollectiveTransport", "Operation", "Rows"]

# Keeps these messages apart from the user's own point-to-point messages on the same group.
_TAG = 0x0DEE
_MAX_AGREED_FIELDS = 24
_MAX_PEER_VALUES = 4
# Version, operation, transport, operation index, number of fields; then the fields, and the values for the one peer.
_NUM_FIXED_COLUMNS = 5
_HEADER_LEN = _NUM_FIXED_COLUMNS + _MAX_AGREED_FIELDS + _MAX_PEER_VALUES
_PROTOCOL_VERSION = 1
# Part of the timeout kept back to ask the survivors who is late, and its upper bound.
_ROLL_CALL_SHARE = 0.25
_MAX_ROLL_CALL_S = 3.0
# A year. The group's backends count in milliseconds of few bits, and none knows infinity.
_MAX_TIMEOUT_S = 365.0 * 24 * 3600
# Longest wait for the store when a refusal is posted or withdrawn.
_MAX_POST_S = 1.0

# Transports are made in the same order on every rank, so a count per group gives each the same number everywhere.
_num_transports: defaultdict[tuple[str, tuple[int, ...]], itertools.count[int]] = defaultdict(itertools.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedField:
    """A value that every rank must pass alike.

    Attributes:
        name: The argument's name, for the message.
        value: What this rank passed, as an integer of at most 63 bits and a sign.
        show: Turns an integer back into what a reader knows, for the message.

    Raises:
        ConfigError: The value has more bits.
    """

    name: str
    value: int
    show: Callable[[int], str] = str

    def __post_init__(self) -> None:
        if not -(2**63) <= self.value < 2**63:
            raise ConfigError(f"{self.name} must fit into 64 bits, sign included (got {self.value}); pass less")

    @classmethod
    def of_dtype(cls, name: str, dtype: torch.dtype | None) -> AgreedField:
        """A field that holds a dtype; None means that there is no such tensor."""
        return cls(name=name, value=0 if dtype is None else _code(str(dtype)), show=_show_dtype)


class Rows(NamedTuple):
    """One tensor to exchange, `[num_rows, ...]` contiguous, and where to receive; None receives into a new tensor."""

    rows: torch.Tensor
    out: torch.Tensor | None = None


class CollectiveTransport:
    """Exchanges rows between the ranks of a group.

    Point-to-point messages are used rather than `all_to_all`, because each can be waited for by itself: that is what
    tells which peer is late. Tensors on a device that the group has no backend for are staged through one that it has.

    Args:
        group: Any `torch.distributed` group, or None for the default group.
        timeout_s: How long one operation may wait for a peer, the search for the culprit included.
        name: What messages call the owner, for example `ElasticBuffer`.
        operations: The names of all operations, so that a disagreement about them can be named.

    Collective: the constructor makes no call; every rank must make its transports in the same order.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, timeout_s: float, name: str, operations: Sequence[str]
    ) -> None:
        if not 0 < timeout_s <= _MAX_TIMEOUT_S:
            raise ConfigError(
                f"the timeout of {name} must be positive and at most {_MAX_TIMEOUT_S:.0f} s (got {timeout_s:g}); pass "
                "seconds"
            )
        if not dist.is_initialized():
            raise ConfigError(
                f"{name} needs an initialised process group (got none); "
                "call torch.distributed.init_process_group first, also for a single rank"
            )
        self.group: dist.ProcessGroup = group if group is not None else _world_group()
        self.rank = dist.get_rank(self.group)
        if self.rank < 0:
            raise ConfigError(f"{name} must be made by the members of its group only; this process is not in it")
        self.num_ranks = dist.get_world_size(self.group)
        self.timeout_s = timeout_s
        self.name = name
        self._operations = {_code(operation): operation for operation in operations}
        self._num_operations = 0
        self._failure: CommTimeoutError | None = None
        self._has_refused = False
        # The members too: torch may give the name of a group that was destroyed to one of other ranks.
        members = tuple(dist.get_process_group_ranks(self.group))
        self._number = next(_num_transports[self.group.group_name, members])
        store_prefix = f"deep_ep/{name}/{_code(repr(members))}/{self._number}"
        self._roll_call = RollCall(_group_store(self.group, store_prefix), rank=self.rank, num_ranks=self.num_ranks)
        self._backends = _backend_of_device(self.group)

    def begin(
        self, name: str, fields: Sequence[AgreedField], peer_values: Sequence[Sequence[int]] | None = None
    ) -> Operation:
        """Open an operation: tell every peer what this rank was called with, and hear the same from each.

        Args:
            name: One of the transport's operations.
            fields: The values that every rank must pass alike; at most 24, the same names on every rank.
            peer_values: `[num_ranks, n]`, n <= 4: a few integers for each peer, for example row counts.

        Returns:
            The operation, whose `peer_values[r]` holds what rank r sent to this rank.

        Raises:
            RankMismatchError: Ranks disagree; raised on every rank.
            CommTimeoutError: A peer did not arrive.

        Collective: yes.
        """
        self._check_usable()
        assert len(fields) <= _MAX_AGREED_FIELDS, (name, len(fields))
        num_values = 0 if peer_values is None else len(peer_values[0])
        assert num_values <= _MAX_PEER_VALUES, (name, num_values)
        header = torch.zeros(self.num_ranks, _HEADER_LEN, dtype=torch.int64)
        header[:, 0] = _PROTOCOL_VERSION
        header[:, 1] = _code(name)
        header[:, 2] = self._number
        header[:, 3] = self._num_operations + 1
        header[:, 4] = len(fields)
        if fields:
            values = torch.tensor([field.value for field in fields], dtype=torch.int64)
            header[:, _NUM_FIXED_COLUMNS:][:, : len(fields)] = values
        if peer_values is not None and num_values:
            header[:, -_MAX_PEER_VALUES:][:, :num_values] = torch.tensor(peer_values, dtype=torch.int64)
        if self._has_refused:
            # This rank takes part after all, so its refusal must not explain a later failure.
            self._roll_call.withdraw(timeout_s=_MAX_POST_S)
            self._has_refused = False
        self._num_operations += 1
        operation = Operation(self, f"{name} #{self._num_operations}", self._num_operations)
        ones = [1] * self.num_ranks
        heard = operation.exchange_rows(header, ones, ones, "arguments").tolist()
        self._check_agreement(operation, fields, heard)
        operation.peer_values = [row[-_MAX_PEER_VALUES:][:num_values] for row in heard]
        return operation

    def _check_agreement(self, operation: Operation, fields: Sequence[AgreedField], heard: list[list[int]]) -> None:
        checks: list[tuple[str, int, Callable[[int], str]]] = [
            ("protocol version", 0, str),
            ("operation", 1, lambda code: self._operations.get(code, f"an operation of code {code}")),
            ("instance", 2, lambda number: f"number {number} of this group"),
            ("number of operations so far", 3, str),
            ("number of arguments", 4, str),
        ]
        checks += [(field.name, _NUM_FIXED_COLUMNS + column, field.show) for column, field in enumerate(fields)]
        for field_name, column, show in checks:
            values = [row[column] for row in heard]
            if len(set(values)) > 1:
                listed = ", ".join(f"rank {rank}: {show(value)}" for rank, value in enumerate(values))
                raise RankMismatchError(
                    f"every rank of the group must call {self.name} with the same {field_name} (got {listed}; seen in "
                    f"{operation.name} on rank {self.rank}); nothing was sent, make the ranks agree and call again",
                    field=field_name,
                    values=[show(value) for value in values],
                )

    def report_rejection(self, operation: str, reason: str) -> None:
        """Leave word that this rank refuses the operation that its peers may be in, and why.

        Peers that wait for this rank then name the reason instead of a silence. The next `begin` of this rank takes the
        word back. Cheap, and never raises.
        Collective: no.
        """
        if self._failure is not None:
            # The report on the failure stands: peers may still be asking for it.
            return
        self._has_refused = True
        report = RankReport(
            rank=self.rank, operation_idx=self._num_operations + 1, phase_idx=0, phase=operation, rejection=reason
        )
        self._roll_call.post(report, timeout_s=_MAX_POST_S)

    @property
    def _roll_call_s(self) -> float:
        """How much of the timeout is kept back for the roll call."""
        return min(_MAX_ROLL_CALL_S, self.timeout_s * _ROLL_CALL_SHARE)

    def _check_usable(self) -> None:
        if self._failure is not None:
            raise TransportError(
                f"{self.name} cannot be used on rank {self.rank} after a failed operation ({self._failure}); "
                "make a new process group and a new buffer"
            ) from self._failure

    def _wire_device(self, device: torch.device) -> torch.device:
        """Where tensors of `device` must lie to be sent."""
        backend = self._backends.get(device.type)
        # gloo claims CUDA too, but its point-to-point messages take host memory only.
        if backend is not None and (device.type == "cpu" or backend != "gloo"):
            return device
        if "cpu" in self._backends:
            return torch.device("cpu")
        if "cuda" in self._backends:
            return torch.device("cuda", torch.cuda.current_device())
        raise ConfigError(
            f"{self.name} needs a group with a backend for {device.type} or for the CPU (got {self._backends}, on "
            f"rank {self.rank}); initialise the group with one, for example backend='cpu:gloo,cuda:nccl'"
        )

    def _fail(self, operation: Operation, phase: str, waiting_on: int | None, cause: BaseException) -> NoReturn:
        """Find out who is late, and raise the error that names them."""
        own = RankReport(
            rank=self.rank,
            operation_idx=operation.idx,
            phase_idx=operation.num_phases,
            phase=phase,
            waiting_on=waiting_on,
        )
        deadline = time.monotonic() + self._roll_call_s
        reports = None
        # A store that does not take the report does not answer either.
        if self._roll_call.post(own, timeout_s=self._roll_call_s):
            reports = self._roll_call.collect(operation.idx, timeout_s=max(deadline - time.monotonic(), 0.0))
        peers = find_culprits(own, reports, num_ranks=self.num_ranks)
        self._failure = CommTimeoutError(
            describe_failure(
                own, reports, peers=peers, num_ranks=self.num_ranks, timeout_s=self.timeout_s, cause=cause
            ),
            phase=phase,
            rank=self.rank,
            peers=peers,
            reports={rank: str(report) for rank, report in (reports or {}).items()},
        )
        raise self._failure from cause


class Operation:
    """One operation in progress; made by `CollectiveTransport.begin`.

    Attributes:
        name: Name and number, for messages.
        idx: Number of the operation on this transport, from 1.
        num_phases: Number of exchanges begun.
        peer_values: What each rank sent to this rank when the operation began.
    """

    def __init__(self, transport: CollectiveTransport, name: str, idx: int) -> None:
        self._transport = transport
        self.name = name
        self.idx = idx
        self.num_phases = 0
        self.peer_values: list[list[int]] = []
        # One deadline for the whole operation, so that several exchanges do not add up their timeouts.
        self._deadline = time.monotonic() + transport.timeout_s - transport._roll_call_s

    def exchange_rows(
        self,
        rows: torch.Tensor,
        num_send_rows: Sequence[int],
        num_recv_rows: Sequence[int],
        phase: str,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Send consecutive runs of rows to the ranks, and receive theirs, ordered by rank.

        Args:
            rows: `[sum(num_send_rows), ...]` contiguous, any dtype; the run for rank 0 first.
            num_send_rows: Rows for each rank; 0 sends no message.
            num_recv_rows: Rows from each rank, as those ranks send them.
            phase: What is exchanged, for messages.
            out: `[>= sum(num_recv_rows), ...]` contiguous, of the rows' dtype and device, received into; None
                allocates exactly.

        Returns:
            `out`, or a new tensor; rows from rank 0 first.

        Raises:
            CommTimeoutError: A peer died or did not arrive before the operation's deadline.
            TransportError: The group's backend failed for another reason.

        Collective: yes. Stream: on CUDA the host waits until the rows have arrived.
        """
        return self.exchange([Rows(rows, out)], num_send_rows, num_recv_rows, phase)[0]

    def exchange(
        self, parts: Sequence[Rows], num_send_rows: Sequence[int], num_recv_rows: Sequence[int], phase: str
    ) -> list[torch.Tensor]:
        """`exchange_rows` for several tensors with the same row counts, all under way at once.

        Returns:
            What arrived, one tensor for each part.
        """
        self._transport._check_usable()
        self.num_phases += 1
        num_recv, me = sum(num_recv_rows), self._transport.rank
        assert num_send_rows[me] == num_recv_rows[me], (self.name, phase, num_send_rows, num_recv_rows)
        # Ends of the messages: (what is sent, where it is received), for each peer; and copies for after the wait.
        messages: list[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]] = []
        results: list[torch.Tensor] = []
        unstaging: list[tuple[torch.Tensor, torch.Tensor]] = []
        for rows, given_out in parts:
            out = rows.new_empty((num_recv, *rows.shape[1:])) if given_out is None else given_out
            assert rows.is_contiguous(), (self.name, phase)
            assert out.is_contiguous(), (self.name, phase)
            assert len(rows) == sum(num_send_rows), (self.name, phase, len(rows), num_send_rows)
            assert len(out) >= num_recv, (self.name, phase, len(out), num_recv)
            assert (out.dtype, out.shape[1:]) == (rows.dtype, rows.shape[1:]), (self.name, phase, out.dtype, out.shape)
            wire_device = self._transport._wire_device(rows.device)
            send_bytes = _as_bytes(rows).to(wire_device)
            recv_bytes = _as_bytes(out)[:num_recv]
            staged = recv_bytes
            if recv_bytes.device != wire_device:
                staged = torch.empty_like(recv_bytes, device=wire_device)
                unstaging.append((recv_bytes, staged))
            messages.append((send_bytes.split(list(num_send_rows)), staged.split(list(num_recv_rows))))
            results.append(out)
        for send_chunks, recv_chunks in messages:
            recv_chunks[me].copy_(send_chunks[me])
        self._exchange_messages(messages, f"{self.name}: {phase}")
        for recv_bytes, staged in unstaging:
            recv_bytes.copy_(staged)
        return results

    def _exchange_messages(
        self, messages: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]], phase: str
    ) -> None:
        transport, group = self._transport, self._transport.group
        # Start with the next rank, so that the ranks do not all send to rank 0 first.
        peers = [(transport.rank + shift) % transport.num_ranks for shift in range(1, transport.num_ranks)]
        recvs = [(dist.irecv, recv_chunks[peer], peer) for _, recv_chunks in messages for peer in peers]
        sends = [(dist.isend, send_chunks[peer], peer) for send_chunks, _ in messages for peer in peers]
        ops = [
            dist.P2POp(call, chunk, group=group, tag=_TAG, group_peer=peer)
            for call, chunk, peer in recvs + sends
            if chunk.numel()
        ]
        if not ops:
            return
        is_on_cpu = ops[0].tensor.device.type == "cpu"
        waiting_on: int | None = None
        try:
            works = dist.batch_isend_irecv(ops)
            if is_on_cpu:
                for op, work in zip(ops, works, strict=True):
                    waiting_on = op.group_peer
                    # 1 ms at least: a zero would mean "no timeout".
                    work.wait(timedelta(seconds=max(self._deadline - time.monotonic(), 1e-3)))
            else:
                _poll(works, self._deadline)
        except TimeoutError as error:
            transport._fail(self, phase, waiting_on, error)
        except RuntimeError as error:
            # On the CPU the backend has no error of its own for a late or lost peer.
            if is_on_cpu:
                transport._fail(self, phase, waiting_on, error)
            raise TransportError(
                f"the group's backend failed in {phase} on rank {transport.rank} of {transport.num_ranks}: {error}; "
                "see its own documentation for the cause",
                call=phase,
            ) from error


def _poll(works: Sequence[Any], deadline: float) -> None:
    """Wait on the host until device-side work is done; waiting for it inside a stream would have no deadline."""
    while not all(work.is_completed() for work in works):
        if time.monotonic() > deadline:
            raise TimeoutError("messages were still missing when the time was over")
        time.sleep(20e-6)
    for work in works:
        work.wait()


def _as_bytes(rows: torch.Tensor) -> torch.Tensor:
    """The rows as `[num_rows, row_bytes]` of uint8, sharing their memory."""
    row_bytes = rows.element_size() * math.prod(rows.shape[1:])
    return rows.view(-1).view(torch.uint8).view(len(rows), row_bytes)


def _code(name: str) -> int:
    """A stable integer for a name: the same in every process, unlike `hash`."""
    return zlib.crc32(name.encode())


def _show_dtype(value: int) -> str:
    if value == 0:
        return "none"
    names = (str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype))
    return next((name.removeprefix("torch.") for name in names if _code(name) == value), f"a dtype of code {value}")


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _group_store(group: dist.ProcessGroup, prefix: str) -> Any | None:
    """A view of the group's store in a space of its own; None where the group has no store."""
    try:
        store = group.get_group_store()
    except (AttributeError, RuntimeError):
        return None
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # public, but not in __all__


def _backend_of_device(group: dist.ProcessGroup) -> dict[str, str]:
    """The backend's name for each device type that the group serves, for example {"cpu": "gloo", "cuda": "nccl"}."""
    config = dist.get_backend_config(group)
    pairs = [item.split(":") for item in config.split(",")]
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
