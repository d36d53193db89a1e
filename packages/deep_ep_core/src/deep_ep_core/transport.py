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
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from deep_ep_core.errors import CommTimeoutError, ConfigError, RankMismatchError, TransportError
from deep_ep_core.roll_call import RankReport, RollCall, find_culprits

__all__ = ["AgreedField", "CollectiveTransport", "Operation"]

# Keeps these messages apart from the user's own point-to-point messages on the same group.
_TAG = 0x0DEE
_MAX_AGREED_FIELDS = 24
_MAX_PEER_VALUES = 4
# Version, operation, operation index, number of fields, the fields, the values for the one peer.
_HEADER_LEN = 4 + _MAX_AGREED_FIELDS + _MAX_PEER_VALUES
_PROTOCOL_VERSION = 1
# Part of the timeout kept back to ask the survivors who is late, and its upper bound.
_ROLL_CALL_SHARE = 0.25
_MAX_ROLL_CALL_S = 3.0

# Buffers are made in the same order on every rank, so a count per group gives all of them the same name.
_num_transports: defaultdict[str, itertools.count[int]] = defaultdict(itertools.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgreedField:
    """A value that every rank must pass alike.

    Attributes:
        name: The argument's name, for the message.
        value: What this rank passed, as an integer of at most 63 bits and a sign.
        show: Turns an integer back into what a reader knows, for the message.
    """

    name: str
    value: int
    show: Callable[[int], str] = str

    @classmethod
    def of_dtype(cls, name: str, dtype: torch.dtype | None) -> AgreedField:
        """A field that holds a dtype; None means that there is no such tensor."""
        return cls(name=name, value=0 if dtype is None else _code(str(dtype)), show=_show_dtype)


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
        group_name = self.group.group_name
        store_prefix = f"deep_ep/{name}/{next(_num_transports[group_name])}"
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
        self._num_operations += 1
        operation = Operation(self, f"{name} #{self._num_operations}", self._num_operations)
        num_values = 0 if peer_values is None else len(peer_values[0])
        assert num_values <= _MAX_PEER_VALUES, (name, num_values)
        header = torch.zeros(self.num_ranks, _HEADER_LEN, dtype=torch.int64)
        header[:, 0] = _PROTOCOL_VERSION
        header[:, 1] = _code(name)
        header[:, 2] = self._num_operations
        header[:, 3] = len(fields)
        if fields:
            header[:, 4 : 4 + len(fields)] = torch.tensor([field.value for field in fields], dtype=torch.int64)
        if peer_values is not None and num_values:
            header[:, -_MAX_PEER_VALUES:][:, :num_values] = torch.tensor(peer_values, dtype=torch.int64)
        ones = [1] * self.num_ranks
        heard = operation.exchange_rows(header, ones, ones, "arguments").tolist()
        self._check_agreement(operation, fields, heard)
        operation.peer_values = [row[-_MAX_PEER_VALUES:][:num_values] for row in heard]
        return operation

    def _check_agreement(self, operation: Operation, fields: Sequence[AgreedField], heard: list[list[int]]) -> None:
        checks: list[tuple[str, int, Callable[[int], str]]] = [
            ("protocol version", 0, str),
            ("operation", 1, lambda code: self._operations.get(code, f"an operation of code {code}")),
            ("number of operations so far", 2, str),
            ("number of arguments", 3, str),
        ]
        checks += [(field.name, 4 + column, field.show) for column, field in enumerate(fields)]
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

        Peers that wait for this rank then name the reason instead of a silence. Cheap, and never raises.
        Collective: no.
        """
        report = RankReport(
            rank=self.rank, operation_idx=self._num_operations + 1, phase_idx=0, phase=operation, rejection=reason
        )
        self._roll_call.post(report, timeout_s=1.0)

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
        roll_call_s = min(_MAX_ROLL_CALL_S, self.timeout_s * _ROLL_CALL_SHARE)
        self._roll_call.post(own, timeout_s=roll_call_s)
        reports = self._roll_call.collect(operation.idx, timeout_s=roll_call_s)
        peers = find_culprits(own, reports, num_ranks=self.num_ranks)
        self._failure = CommTimeoutError(
            _describe_failure(self, own, reports, peers, cause),
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
        wait_s = transport.timeout_s - min(_MAX_ROLL_CALL_S, transport.timeout_s * _ROLL_CALL_SHARE)
        self._deadline = time.monotonic() + wait_s

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

        Collective: yes. Stream: on CUDA the host waits until the rows have arrived.
        """
        self._transport._check_usable()
        self.num_phases += 1
        num_recv = sum(num_recv_rows)
        if out is None:
            out = rows.new_empty((num_recv, *rows.shape[1:]))
        assert rows.is_contiguous() and out.is_contiguous(), (self.name, phase)
        assert len(rows) == sum(num_send_rows) and len(out) >= num_recv, (self.name, phase, len(rows), len(out))
        wire_device = self._transport._wire_device(rows.device)
        send_bytes = _as_bytes(rows).to(wire_device)
        recv_bytes = _as_bytes(out)[:num_recv]
        staged = (
            recv_bytes
            if recv_bytes.device == wire_device
            else recv_bytes.new_empty(recv_bytes.shape, device=wire_device)
        )
        send_chunks, recv_chunks = send_bytes.split(list(num_send_rows)), staged.split(list(num_recv_rows))
        me = self._transport.rank
        recv_chunks[me].copy_(send_chunks[me])
        self._exchange_chunks(send_chunks, recv_chunks, wire_device, f"{self.name}: {phase}")
        if staged is not recv_bytes:
            recv_bytes.copy_(staged)
        return out

    def _exchange_chunks(
        self,
        send_chunks: Sequence[torch.Tensor],
        recv_chunks: Sequence[torch.Tensor],
        wire_device: torch.device,
        phase: str,
    ) -> None:
        transport, group = self._transport, self._transport.group
        # Start with the next rank, so that the ranks do not all send to rank 0 first.
        peers = [(transport.rank + shift) % transport.num_ranks for shift in range(1, transport.num_ranks)]
        recvs = [
            dist.P2POp(dist.irecv, recv_chunks[peer], group=group, tag=_TAG, group_peer=peer)
            for peer in peers
            if recv_chunks[peer].numel()
        ]
        sends = [
            dist.P2POp(dist.isend, send_chunks[peer], group=group, tag=_TAG, group_peer=peer)
            for peer in peers
            if send_chunks[peer].numel()
        ]
        ops = recvs + sends
        if not ops:
            return
        waiting_on: int | None = None
        try:
            works = dist.batch_isend_irecv(ops)
            if wire_device.type == "cpu":
                for op, work in zip(ops, works, strict=True):
                    waiting_on = op.group_peer
                    # 1 ms at least: a zero would mean "no timeout".
                    work.wait(timedelta(seconds=max(self._deadline - time.monotonic(), 1e-3)))
            else:
                _poll(works, self._deadline)
        except (RuntimeError, TimeoutError) as error:
            transport._fail(self, phase, waiting_on, error)


def _poll(works: Sequence[Any], deadline: float) -> None:
    """Wait on the host until device-side work is done; waiting for it inside a stream would have no deadline."""
    while not all(work.is_completed() for work in works):
        if time.monotonic() > deadline:
            raise TimeoutError("messages were still missing when the time was over")
        time.sleep(20e-6)
    for work in works:
        work.wait()


def _describe_failure(
    transport: CollectiveTransport,
    own: RankReport,
    reports: dict[int, RankReport] | None,
    peers: Sequence[int],
    cause: BaseException,
) -> str:
    who = f"rank {peers[0]}" if len(peers) == 1 else f"ranks {', '.join(map(str, peers))}"
    if list(peers) == [own.rank]:
        who = f"rank {own.rank} (this rank) was late and"
    lines = [
        f"every rank must take part in {own.phase} within {transport.timeout_s:g} s, but {who} did not "
        f"(seen on rank {own.rank} of {transport.num_ranks})"
    ]
    for rank in peers:
        if reports is None:
            lines.append("the other ranks could not be asked: the group's store does not answer")
            break
        if rank in reports:
            lines.append(f"rank {rank} {reports[rank]}")
        elif rank != own.rank:
            lines.append(f"rank {rank} says nothing: it died, or is still on its way")
    lines.append(f"the group's backend said: {str(cause).strip()}")
    lines.append("look at that rank's own output first; a slow rank needs a longer num_cpu_timeout_secs")
    return "; ".join(lines)


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
