"""Owns `EPHandle`: the routing of one dispatch, kept for the combine and for later dispatches with the same routing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

__all__ = ["DeferredTensors", "EPHandle", "Plan", "PlanParts", "RoutingPlan"]


class DeferredTensors(Protocol):
    """Tensors that are made when somebody asks for them; most callers never do."""

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name."""

    def address_of(self, name: str) -> int:
        """Where it begins."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanParts:
    """A plan as it passes through operators.

    Attributes:
        tensors: Its tensors, but for those that the handle has too.
        numbers: What else it holds.
    """

    tensors: list[torch.Tensor]
    numbers: list[int]


class Plan(Protocol):
    """What a backend needs to repeat or to reverse a dispatch; private to the backends."""

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""

    def parts(self, metadata: torch.Tensor) -> PlanParts:
        """What `of_parts` makes it of again. Reads nothing of a device.

        Args:
            metadata: The handle's `recv_src_metadata` as the dispatch wrote it, or the copy that travels instead.
        """

    @classmethod
    def of_parts(cls, parts: PlanParts, metadata: torch.Tensor) -> Plan:
        """The plan of these parts, in a handle with this `recv_src_metadata`."""

    @classmethod
    def new_parts(
        cls, topk_idx: torch.Tensor, *, num_ranks: int, do_expand: bool, new_size: Callable[[], int]
    ) -> PlanParts:
        """Parts of the shapes and dtypes that a dispatch of `topk_idx` makes, for the tracing of operators.

        Values are undefined; `new_size` gives a size that only data decide.
        """


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingPlan:
    """The plan of the collective backend.

    Attributes:
        send_token_idx: `[num_sent]` int64: the token of each sent row, ordered by (destination rank, token).
        num_send_rows: Rows sent to each rank.
        num_recv_rows: Rows received from each rank; also right when the host was not synchronised.
        sent_row_idx: `[num_tokens, num_topk]` int64: position, among the sent rows, of the row that serves this top-k
            entry; -1 where nothing is selected.
        slot_idx: `[num_tokens, num_topk]` int64: position of the token among those sent to that entry's rank, or -1.
        is_master: `[num_tokens, num_topk]` bool: the entry is the last of its token with its destination rank.
    """

    send_token_idx: torch.Tensor
    num_send_rows: tuple[int, ...]
    num_recv_rows: tuple[int, ...]
    sent_row_idx: torch.Tensor
    slot_idx: torch.Tensor
    is_master: torch.Tensor

    @property
    def num_recv(self) -> int:
        """Number of rows received, exact."""
        return sum(self.num_recv_rows)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of it."""
        return [self.send_token_idx, self.sent_row_idx, self.slot_idx, self.is_master]

    def parts(self, metadata: torch.Tensor) -> PlanParts:
        """See `Plan`."""
        return PlanParts(tensors=self.tensors(), numbers=[*self.num_send_rows, *self.num_recv_rows])

    @classmethod
    def of_parts(cls, parts: PlanParts, metadata: torch.Tensor) -> RoutingPlan:
        """See `Plan`."""
        send_token_idx, sent_row_idx, slot_idx, is_master = parts.tensors
        num_ranks = len(parts.numbers) // 2
        return cls(
            send_token_idx=send_token_idx,
            num_send_rows=tuple(parts.numbers[:num_ranks]),
            num_recv_rows=tuple(parts.numbers[num_ranks:]),
            sent_row_idx=sent_row_idx,
            slot_idx=slot_idx,
            is_master=is_master,
        )

    @classmethod
    def new_parts(
        cls, topk_idx: torch.Tensor, *, num_ranks: int, do_expand: bool, new_size: Callable[[], int]
    ) -> PlanParts:
        """See `Plan`."""
        tensors = [
            topk_idx.new_empty(new_size(), dtype=torch.int64),
            topk_idx.new_empty(topk_idx.shape, dtype=torch.int64),
            topk_idx.new_empty(topk_idx.shape, dtype=torch.int64),
            topk_idx.new_empty(topk_idx.shape, dtype=torch.bool),
        ]
        return PlanParts(tensors=tensors, numbers=[0] * (2 * num_ranks))


_DEFERRABLE = frozenset(
    (
        "topk_idx",
        "recv_src_metadata",
        "psum_num_recv_tokens_per_scaleup_rank",
        "psum_num_recv_tokens_per_expert",
        "num_unaligned_recv_tokens_per_expert",
        "dst_buffer_slot_idx",
    )
)


@dataclass(slots=True, kw_only=True, eq=False)
class EPHandle:
    """The routing of one dispatch. Made by `ElasticBuffer.dispatch`, used by `combine` and by cached dispatches.

    N is the number of ranks, M the `num_max_tokens_per_rank`, K the `num_topk`, L the number of local experts, U the
    number of scale-up ranks, T the number of this rank's tokens. Tensors are int32 on the device of `x` unless noted.

    Attributes:
        do_expand: The dispatch laid rows out by expert; decides how `combine` reads its input.
        num_experts: Experts of all ranks.
        expert_alignment: Each expert's rows start at a multiple of this.
        num_max_tokens_per_rank: M of the dispatch.
        num_sms: SM count of the dispatch; the default of `combine`.
        topk_idx: `[T, K]`, of the dtype that was passed: a copy, or the caller's own tensor (`do_handle_copy=False`).
        num_recv_tokens: Rows of the received tensors, one a (token, this rank): exact after a CPU sync, else N*M.
        num_expanded_tokens: Rows of the expert-major tensors: exact after a CPU sync, else the worst case.
        num_recv_tokens_per_expert_list: Aligned counts of the L local experts; empty without a CPU sync.
        psum_num_recv_tokens_per_scaleup_rank: `[U]` inclusive prefix sum, over scale-up peers, of received tokens.
            The last one is the number of received tokens.
        psum_num_recv_tokens_per_expert: `[L]`. Token-major: inclusive prefix sum of the aligned counts. Expert-major:
            where each expert's real rows end.
        num_unaligned_recv_tokens_per_expert: `[L]` real counts.
        recv_src_metadata: `[num_recv_tokens, K + 2]`. Column 0: source rank * M + source token. Column 1: source rank
            * K + position of the last top-k entry that is local. Columns 2...: row in the expert-major tensors of each
            top-k entry, or -1. Rows past the real count are not written. May be replaced by a row permutation of
            itself when the received rows were permuted alike.
        dst_buffer_slot_idx: `[T, K]`: this rank * M + position among the tokens sent to that destination, at the last
            top-k entry of each destination rank; -1 elsewhere.
        token_metadata_at_forward: Always None here: rows are not forwarded.
        channel_linked_list: Always None here.
        cached_recv_src_metadata_before_sort: Always None here: rows arrive sorted.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: torch.Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: torch.Tensor
    psum_num_recv_tokens_per_expert: torch.Tensor
    num_unaligned_recv_tokens_per_expert: torch.Tensor
    recv_src_metadata: torch.Tensor
    dst_buffer_slot_idx: torch.Tensor
    token_metadata_at_forward: torch.Tensor | None = None
    channel_linked_list: torch.Tensor | None = None
    cached_recv_src_metadata_before_sort: torch.Tensor | None = None
    plan: Plan = field(repr=False)
    # Which buffer made it, and its how-manieth dispatch: both are compared before a handle is used.
    buffer_id: int = field(repr=False)
    dispatch_idx: int = field(repr=False)
    # Where attributes come from that were not set yet; None if all were.
    deferred: DeferredTensors | None = field(default=None, repr=False)
    # T, K, and what else is asked of `topk_idx` at every call: known although the tensor may not have been made yet.
    num_tokens: int = field(init=False, repr=False)
    num_topk: int = field(init=False, repr=False)
    topk_idx_dtype: torch.dtype = field(init=False, repr=False)
    device: torch.device = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.num_tokens, self.num_topk = self.topk_idx.shape
        self.topk_idx_dtype, self.device = self.topk_idx.dtype, self.topk_idx.device

    @classmethod
    def with_deferred(cls, deferred: DeferredTensors) -> EPHandle:
        """A handle whose tensors are made when they are first asked for. The caller sets all that is no tensor."""
        handle = cls.__new__(cls)
        handle.deferred = deferred
        handle.token_metadata_at_forward = handle.channel_linked_list = None
        handle.cached_recv_src_metadata_before_sort = None
        return handle

    def __getattr__(self, name: str) -> torch.Tensor:
        # Called for what is not set only.
        if name not in _DEFERRABLE:
            raise AttributeError(f"an EPHandle has no attribute {name}")
        deferred = self.deferred
        assert deferred is not None, "an attribute that is not set is deferred"
        tensor = deferred.tensor(name)
        setattr(self, name, tensor)
        return tensor

    def made(self, name: str) -> torch.Tensor | None:
        """The tensor of that name; None while it is deferred, and then it is as the dispatch wrote it."""
        try:
            tensor: torch.Tensor = object.__getattribute__(self, name)
        except AttributeError:
            return None
        return tensor

    def address_of(self, name: str) -> int:
        """Where the dispatch wrote a tensor of the handle; does not make it."""
        if self.deferred is not None:
            return self.deferred.address_of(name)
        tensor: torch.Tensor = getattr(self, name)
        return tensor.data_ptr()

    @property
    def was_cpu_synced(self) -> bool:
        """Whether the row counts of the received tensors are exact."""
        return len(self.num_recv_tokens_per_expert_list) > 0

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the handle owns or shares, for stream and lifetime bookkeeping."""
        if self.deferred is not None:
            # The plan's are all that the dispatch wrote; a permutation of the metadata may have come since.
            metadata = self.made("recv_src_metadata")
            return [*self.plan.tensors(), *(() if metadata is None else (metadata,))]
        return [
            self.topk_idx,
            self.psum_num_recv_tokens_per_scaleup_rank,
            self.psum_num_recv_tokens_per_expert,
            self.num_unaligned_recv_tokens_per_expert,
            self.recv_src_metadata,
            self.dst_buffer_slot_idx,
            *self.plan.tensors(),
        ]
