"""Owns what a benchmark case is: its sizes, its routing, the bytes that it cannot avoid to move, those that it needs.

It runs nothing. Every rank makes the routing of all ranks from the seed, so nothing here communicates.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias, get_args

import torch

from deep_ep_core.align import align_up, ceil_div
from deep_ep_core.errors import ConfigError
from deep_ep_ep.checks import ROW_ALIGNMENT_BYTES
from deep_ep_ep.choice import RecvMemory
from deep_ep_ep.routing import align_up_tensor
from deep_ep_ep.sizing import (
    MAX_NUM_TOPK,
    RECORD_ALIGNMENT_BYTES,
    dispatch_record_bytes,
    max_expanded_tokens,
    max_recv_tokens,
)

__all__ = [
    "DTYPES",
    "FP8_GROUP_SIZE",
    "LAYOUTS",
    "MODES",
    "OPS",
    "RECV_MEMORIES",
    "Case",
    "Dtype",
    "Layout",
    "Mode",
    "Op",
    "Sweep",
    "busiest_device_bytes",
    "bytes_moved_by_rank",
    "make_topk_idx",
    "window_result_bytes",
]

Op: TypeAlias = Literal["dispatch", "combine", "cached-dispatch"]
Layout: TypeAlias = Literal["token", "expert"]
Dtype: TypeAlias = Literal["bf16", "fp8"]
Mode: TypeAlias = Literal["stream", "graph", "host"]

OPS: tuple[Op, ...] = ("dispatch", "combine", "cached-dispatch")
LAYOUTS: tuple[Layout, ...] = ("token", "expert")
DTYPES: tuple[Dtype, ...] = ("bf16", "fp8")
MODES: tuple[Mode, ...] = ("stream", "graph", "host")
RECV_MEMORIES: tuple[RecvMemory, ...] = get_args(RecvMemory)

# Channels that share a scale.
FP8_GROUP_SIZE = 128
_BF16_BYTES = 2
_SCALE_BYTES = 4
# Of the regions of the window's heap.
_HEAP_ALIGNMENT = 256
# The rank that an imbalance loads most. Which one it is makes no difference: the ranks are alike.
_HOT_RANK = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to measure; the same on all ranks.

    Attributes:
        op: The operation that is timed. `cached-dispatch` repeats the routing of an earlier dispatch.
        layout: Whether received rows are laid out by token or by expert.
        dtype: Of the rows that the operation moves.
        num_ranks: Number of ranks.
        num_tokens: Tokens of each rank.
        hidden: Elements of a token.
        num_topk: Experts of each token.
        num_experts: Experts of all ranks.
        expert_alignment: Rows of each expert start at a multiple of this.
        num_sms: As `ElasticBuffer.dispatch` takes it; 0 leaves it to the library.
        imbalance: Load of the most loaded rank over the mean load, in (token, expert) pairs; 1 routes uniformly.
        seed: Of the routing.
        recv_memory: As `ElasticBuffer` takes it.
        mode: What is timed. `stream`: a call, on the device, with the host's work for it. `graph`: an operation inside
            a CUDA graph of several. `host`: how long a call keeps the host. Only `stream` has a CPU sync.
        name: What a suite calls it; empty outside of one.

    Raises:
        ConfigError: The numbers do not fit together.
    """

    op: Op
    layout: Layout
    dtype: Dtype
    num_ranks: int
    num_tokens: int
    hidden: int
    num_topk: int
    num_experts: int
    expert_alignment: int = 1
    num_sms: int = 0
    imbalance: float = 1.0
    seed: int = 0
    recv_memory: RecvMemory = "auto"
    mode: Mode = "stream"
    name: str = ""

    def __post_init__(self) -> None:
        if self.num_experts % self.num_ranks != 0:
            raise ConfigError(f"the {self.num_experts} experts must be a multiple of the {self.num_ranks} ranks")
        if self.num_topk > self.num_experts:
            raise ConfigError(f"top-{self.num_topk} needs at least as many experts (got {self.num_experts})")
        if self.num_topk > MAX_NUM_TOPK:
            raise ConfigError(f"a token has at most {MAX_NUM_TOPK} experts (got {self.num_topk})")
        if self.payload_bytes % ROW_ALIGNMENT_BYTES != 0:
            raise ConfigError(
                f"a row must be a multiple of {ROW_ALIGNMENT_BYTES} bytes (got {self.hidden} elements of {self.dtype}, "
                f"{self.payload_bytes} bytes)"
            )
        if self.imbalance < 1:
            raise ConfigError(f"the imbalance must be at least 1, which is uniform (got {self.imbalance:g})")
        max_hot = min(self.num_topk, self.num_local_experts)
        if self.imbalance > 1 and self.num_hot_per_token > max_hot:
            raise ConfigError(
                f"an imbalance of {self.imbalance:g} would give the hottest rank {self.num_hot_per_token:g} experts of "
                f"each token, of at most {max_hot}; lower it to {max_hot * self.num_ranks / self.num_topk:g}"
            )
        if self.op == "combine" and self.dtype != "bf16":
            raise ConfigError(f"combine moves bf16 rows (got {self.dtype})")

    @property
    def num_local_experts(self) -> int:
        """Experts of each rank."""
        return self.num_experts // self.num_ranks

    @property
    def num_hot_per_token(self) -> float:
        """Experts of a token on the hottest rank, on average."""
        return self.imbalance * self.num_topk / self.num_ranks

    @property
    def has_cpu_sync(self) -> bool:
        """Whether dispatches size their results exactly."""
        return self.mode == "stream"

    @property
    def payload_bytes(self) -> int:
        """Bytes of a row that is moved, without scales."""
        return self.hidden * (_BF16_BYTES if self.dtype == "bf16" else 1)

    @property
    def num_scales(self) -> int:
        """Scales of a row."""
        return ceil_div(self.hidden, FP8_GROUP_SIZE) if self.dtype == "fp8" else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that is moved, its scales included."""
        return self.payload_bytes + _SCALE_BYTES * self.num_scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Lists of values, of which every combination is a case. The fields are those of `Case`."""

    ops: Sequence[Op]
    layouts: Sequence[Layout]
    dtypes: Sequence[Dtype]
    num_ranks: int
    num_tokens: Sequence[int]
    hidden: Sequence[int]
    num_topk: Sequence[int]
    num_experts: Sequence[int]
    num_sms: Sequence[int] = (0,)
    expert_alignment: int = 1
    imbalance: float = 1.0
    seed: int = 0
    recv_memories: Sequence[RecvMemory] = ("auto",)
    modes: Sequence[Mode] = ("stream",)

    def cases(self) -> list[Case]:
        """The cases, each once: a combine moves bf16 rows whatever the dispatch before it moved.

        Raises:
            ConfigError: Some combination does not fit together.
        """
        cases = [
            Case(
                op=op,
                layout=layout,
                dtype="bf16" if op == "combine" else dtype,
                num_ranks=self.num_ranks,
                num_tokens=num_tokens,
                hidden=hidden,
                num_topk=num_topk,
                num_experts=num_experts,
                expert_alignment=self.expert_alignment,
                num_sms=num_sms,
                imbalance=self.imbalance,
                seed=self.seed,
                recv_memory=recv_memory,
                mode=mode,
            )
            for (num_tokens, hidden, num_topk, num_experts), num_sms, recv_memory, mode, layout, dtype, op in product(
                product(self.num_tokens, self.hidden, self.num_topk, self.num_experts),
                self.num_sms,
                self.recv_memories,
                self.modes,
                self.layouts,
                self.dtypes,
                self.ops,
            )
        ]
        return list(dict.fromkeys(cases))


def make_topk_idx(case: Case) -> torch.Tensor:
    """The routing of all ranks: `[num_ranks, num_tokens, num_topk]` int64 on the CPU, no expert twice in a row.

    With an imbalance each token takes its experts on the hot rank first, as many as hit the mean exactly (one more or
    less at random where the mean is no integer), then the others, all uniformly among their kind. Cases that differ in
    other things share one tensor, which is not to be written to.
    """
    plain = Case(
        op="dispatch",
        layout="token",
        dtype="bf16",
        num_ranks=case.num_ranks,
        num_tokens=case.num_tokens,
        hidden=ROW_ALIGNMENT_BYTES,
        num_topk=case.num_topk,
        num_experts=case.num_experts,
        imbalance=case.imbalance,
        seed=case.seed,
    )
    return _draw_topk_idx(plain)


@functools.lru_cache(maxsize=2)
def _draw_topk_idx(case: Case) -> torch.Tensor:
    is_hot = torch.arange(case.num_experts) // case.num_local_experts == _HOT_RANK
    topk_idx = []
    for rank in range(case.num_ranks):
        generator = torch.Generator().manual_seed(case.seed * case.num_ranks + rank)
        scores = torch.rand(case.num_tokens, case.num_experts, generator=generator)
        if case.imbalance > 1:
            draws = torch.rand(case.num_tokens, 1, generator=generator)
            num_hot = (case.num_hot_per_token + draws).floor().long()
            # The best hot experts win, by a lead over all others; hot ones beyond that number lose to all others.
            place_among_hot = scores.masked_fill(~is_hot, -1).argsort(1, descending=True).argsort(1)
            scores += torch.where(is_hot, torch.where(place_among_hot < num_hot, 1.0, -1.0), 0.0)
        topk_idx.append(scores.topk(case.num_topk, dim=1, sorted=False).indices)
    return torch.stack(topk_idx)


def bytes_moved_by_rank(case: Case, topk_idx: torch.Tensor) -> list[int]:
    """The least that a case reads from and writes to each rank's memory, links and caches left aside.

    A dispatch reads each token that goes anywhere once, on the rank that holds it, and writes each received row once,
    to its last place: one row for each (token, rank) pair, or by expert one for each (token, expert) pair. A combine
    reads those same rows once, and writes each token once. Scales belong to a row; ids, weights and counts, which are
    about a hundredth of it, are left out.

    Args:
        case: The case.
        topk_idx: `[num_ranks, num_tokens, num_topk]`, negative for "none".

    Returns:
        Bytes, by rank.
    """
    num_ranks = case.num_ranks
    dst_rank = torch.where(topk_idx >= 0, topk_idx // case.num_local_experts, -1)
    num_rows = []
    for rank in range(num_ranks):
        is_mine = dst_rank == rank
        num_received = int(is_mine.sum() if case.layout == "expert" else is_mine.any(2).sum())
        num_sent = case.num_tokens if case.op == "combine" else int((dst_rank[rank] >= 0).any(1).sum())
        num_rows.append(num_received + num_sent)
    return [num * case.row_bytes for num in num_rows]


def window_result_bytes(case: Case, topk_idx: torch.Tensor) -> int:
    """Bytes that the results of one dispatch take at most of any rank's window, where they stay in it.

    Rows, and for the time of the call what comes with each token: scales, expert ids, weights.

    Args:
        case: The case; of a combine, that of the dispatch before it.
        topk_idx: `[num_ranks, num_tokens, num_topk]`, negative for "none".
    """
    num_ranks, num_local_experts = case.num_ranks, case.num_local_experts
    if case.has_cpu_sync:
        dst_rank = torch.where(topk_idx >= 0, topk_idx // num_local_experts, -1)
        num_recv = torch.stack([(dst_rank == rank).any(2).sum() for rank in range(num_ranks)])
        num_of_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=case.num_experts)
        num_expanded = align_up_tensor(num_of_expert, case.expert_alignment).view(num_ranks, -1).sum(1)
    else:
        num_recv = torch.tensor([max_recv_tokens(num_ranks, case.num_tokens)])
        num_expanded = torch.tensor(
            [max_expanded_tokens(num_ranks, case.num_tokens, case.num_topk, num_local_experts, case.expert_alignment)]
        )
    padded_bytes = align_up(case.payload_bytes, RECORD_ALIGNMENT_BYTES)
    record_bytes = dispatch_record_bytes(
        payload_bytes=padded_bytes, num_sf_packs=case.num_scales, num_topk=case.num_topk
    )
    num_rows = num_expanded if case.layout == "expert" else num_recv
    rows_bytes = align_up_tensor(num_rows * case.payload_bytes, _HEAP_ALIGNMENT)
    return int((rows_bytes + align_up_tensor(num_recv * (record_bytes - padded_bytes), _HEAP_ALIGNMENT)).max())


def busiest_device_bytes(bytes_by_rank: Sequence[int], device_of_rank: Sequence[str]) -> int:
    """The bytes of the device whose ranks move most together: ranks on one device share its memory."""
    bytes_of: defaultdict[str, int] = defaultdict(int)
    for num_bytes, device in zip(bytes_by_rank, device_of_rank, strict=True):
        bytes_of[device] += num_bytes
    return max(bytes_of.values())
