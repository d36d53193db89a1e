"""Problems whose answer is computed as a whole, for sizes and numbers of rounds that the reference is too slow for.

Row n of a group (rank * M + token) is made of n alone, and so is each weight: every rank knows what any row must be.
Elements are integers of at most 8 bits. Sums of 32 of them are exact in float32, in any order; only roundings remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ep_cases import SETTING, assert_bits_equal

from deep_ep_ep import EPHandle


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A routing of all ranks, and how rows are made.

    Attributes:
        topk_idx: `[num_tokens, num_topk]` of each rank, on the CPU.
        num_max_tokens: M.
        salt: Makes rows of problems differ.
        num_sf_packs: Scales of a row; 0 is none.
    """

    topk_idx: Sequence[torch.Tensor]
    num_experts: int
    num_max_tokens: int
    hidden: int
    expert_alignment: int = 1
    dtype: torch.dtype = torch.bfloat16
    salt: int = 0
    num_sf_packs: int = 0

    @property
    def num_topk(self) -> int:
        return self.topk_idx[0].size(1)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // len(self.topk_idx)

    def row_idx(self, rank: int) -> torch.Tensor:
        """The numbers n of a rank's tokens."""
        return rank * self.num_max_tokens + torch.arange(self.topk_idx[rank].size(0))

    def rows(self, row_idx: torch.Tensor) -> torch.Tensor:
        """The rows of these numbers, `[len(row_idx), hidden]`."""
        columns = torch.arange(self.hidden)
        values = (row_idx.unsqueeze(1) * 7 + columns * 13 + self.salt * 29) % 251
        # Whatever the rest is, the first ones tell the row.
        for column, part in enumerate((row_idx % 256, row_idx // 256 % 256, row_idx // 65536)):
            values[:, column] = part
        return values.to(self.dtype)

    def scales(self, row_idx: torch.Tensor) -> torch.Tensor:
        """The scales of these rows, `[len(row_idx), num_sf_packs]` float32."""
        return (row_idx.unsqueeze(1) * self.num_sf_packs + torch.arange(self.num_sf_packs) + 1).float()

    def weights(self, row_idx: torch.Tensor) -> torch.Tensor:
        """The weights of these rows, `[len(row_idx), num_topk]` float32."""
        values = row_idx.unsqueeze(1) * self.num_topk + torch.arange(self.num_topk) + 1
        # Exact in float32: there are less than 2^20 entries.
        return (values + (self.salt % 15) * 2**20).float()

    def inputs(self, rank: int) -> tuple[object, torch.Tensor, torch.Tensor]:
        """What a rank passes: x, or x and scales; topk_idx; topk_weights."""
        row_idx = self.row_idx(rank)
        x, device = self.rows(row_idx).to(SETTING.device), SETTING.device
        both = (x, self.scales(row_idx).to(device)) if self.num_sf_packs else x
        return both, self.topk_idx[rank].to(device), self.weights(row_idx).to(device)


def make_problem(
    seed: int,
    num_tokens: Sequence[int],
    *,
    num_experts: int,
    num_topk: int,
    num_max_tokens: int | None = None,
    idx_dtype: torch.dtype = torch.int64,
    masked_share: float = 0.15,
    hidden: int = 64,
    expert_alignment: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    num_sf_packs: int = 0,
) -> Problem:
    """A problem with random routing, the same for the same arguments in every process."""
    generator = torch.Generator().manual_seed(seed)
    topk_idx = []
    for count in num_tokens:
        scores = torch.rand(count, num_experts, generator=generator)
        picked = scores.topk(min(num_topk, num_experts), dim=1, sorted=False).indices
        # A row may have more entries than there are experts.
        padded = torch.nn.functional.pad(picked, (0, num_topk - picked.size(1)), value=-1)
        mixed = padded[:, torch.randperm(num_topk, generator=generator)]
        mixed[torch.rand(mixed.shape, generator=generator) < masked_share] = -1
        topk_idx.append(mixed.to(idx_dtype))
    return Problem(
        topk_idx=topk_idx,
        num_experts=num_experts,
        num_max_tokens=max(num_max_tokens or 0, *num_tokens, 1),
        hidden=hidden,
        expert_alignment=expert_alignment,
        dtype=dtype,
        salt=seed % 97,
        num_sf_packs=num_sf_packs,
    )


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """What one rank must receive.

    Attributes:
        row_idx: Number n of each received row, in order.
        per_rank: Rows from each rank.
        local: `[num_recv, num_topk]` local expert of each entry, or -1.
        expert_row: `[num_recv, num_topk]` expert-major row of each entry, or -1.
        expert_counts: Rows of each local expert.
        num_expanded: Expert-major rows, gaps included.
    """

    row_idx: torch.Tensor
    per_rank: torch.Tensor
    local: torch.Tensor
    expert_row: torch.Tensor
    expert_counts: torch.Tensor
    num_expanded: int


def arrival_of(problem: Problem, rank: int) -> Arrival:
    """What a rank must receive."""
    num_local = problem.num_local_experts
    row_idx, local, per_rank = [], [], []
    for source, topk_idx in enumerate(problem.topk_idx):
        own = topk_idx.long() - rank * num_local
        own = torch.where((own >= 0) & (own < num_local), own, -1)
        is_sent = (own >= 0).any(1)
        row_idx.append(problem.row_idx(source)[is_sent])
        local.append(own[is_sent])
        per_rank.append(int(is_sent.sum()))
    all_local = torch.cat(local)
    entries = (all_local >= 0).nonzero()
    experts = all_local[entries[:, 0], entries[:, 1]]
    counts = torch.bincount(experts, minlength=num_local)
    aligned = (counts + problem.expert_alignment - 1) // problem.expert_alignment * problem.expert_alignment
    order = experts.argsort(stable=True)
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[experts[order]]
    expert_row = torch.full_like(all_local, -1)
    expert_row[entries[order, 0], entries[order, 1]] = (aligned.cumsum(0) - aligned)[experts[order]] + place
    return Arrival(
        row_idx=torch.cat(row_idx),
        per_rank=torch.tensor(per_rank),
        local=all_local,
        expert_row=expert_row,
        expert_counts=counts,
        num_expanded=int(aligned.sum()),
    )


def check_arrival(problem: Problem, rank: int, results: Sequence[object], *, do_cpu_sync: bool = True) -> None:
    """What a fresh dispatch returned, the handle included; weights may be None."""
    recv_x, recv_idx, recv_weights, handle = results[:4]
    assert isinstance(handle, EPHandle)
    wanted = arrival_of(problem, rank)
    num_recv, num_topk = len(wanted.row_idx), problem.num_topk
    check_rows(problem, wanted, recv_x, recv_weights, do_expand=handle.do_expand, do_cpu_sync=do_cpu_sync)
    if not handle.do_expand:
        assert isinstance(recv_idx, torch.Tensor)
        assert_bits_equal(recv_idx[:num_recv], wanted.local.to(recv_idx.dtype), "recv_topk_idx")
    ends = handle.psum_num_recv_tokens_per_scaleup_rank.cpu()
    per_peer = wanted.per_rank
    if SETTING.ranks_per_node:
        per_peer = per_peer.view(-1, SETTING.ranks_per_node).sum(0)
    assert torch.equal(ends, per_peer.cumsum(0).int()), (ends, wanted.per_rank)
    counts = handle.num_unaligned_recv_tokens_per_expert.cpu()
    assert torch.equal(counts, wanted.expert_counts.int()), (counts, wanted.expert_counts)
    metadata = handle.recv_src_metadata[:num_recv].cpu()
    last_entry = (wanted.local >= 0).int() * torch.arange(1, num_topk + 1)
    source = wanted.row_idx // problem.num_max_tokens
    assert torch.equal(metadata[:, 0], wanted.row_idx.int()), "metadata: rows"
    assert torch.equal(metadata[:, 1].long(), source * num_topk + last_entry.amax(1) - 1), "metadata: last entries"
    if handle.do_expand:
        assert torch.equal(metadata[:, 2:], wanted.expert_row.int()), "metadata: expert rows"


def check_rows(
    problem: Problem, wanted: Arrival, recv_x: object, recv_weights: object, *, do_expand: bool, do_cpu_sync: bool
) -> None:
    """The rows, scales and weights that a dispatch returned; weights may be None."""
    x, sf = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
    assert isinstance(x, torch.Tensor)
    assert (sf is None) == (problem.num_sf_packs == 0)
    num_recv = len(wanted.row_idx)
    num_rows = wanted.num_expanded if do_expand else num_recv
    assert len(x) == num_rows if do_cpu_sync else len(x) >= num_rows, (len(x), num_rows)
    got_x, got_sf = x.cpu(), None if sf is None else sf.cpu()
    weights = problem.weights(wanted.row_idx)
    got_weights = recv_weights.cpu() if isinstance(recv_weights, torch.Tensor) else None
    if do_expand:
        rows, positions = (wanted.expert_row >= 0).nonzero().unbind(1)
        at = wanted.expert_row[rows, positions]
        got_x, got_sf = got_x[at], None if got_sf is None else got_sf[at]
        got_weights = None if got_weights is None else got_weights[at]
        weights = weights[rows, positions]
    else:
        rows = torch.arange(num_recv)
        got_x, got_sf = got_x[:num_recv], None if got_sf is None else got_sf[:num_recv]
        got_weights = None if got_weights is None else got_weights[:num_recv]
    row_idx = wanted.row_idx[rows]
    assert_bits_equal(got_x, problem.rows(row_idx), "recv_x")
    if got_sf is not None:
        assert_bits_equal(got_sf, problem.scales(row_idx), "recv_sf")
    if got_weights is not None:
        assert_bits_equal(got_weights, weights, "recv_topk_weights")


def check_combined(
    problem: Problem,
    rank: int,
    combined: torch.Tensor,
    combined_weights: torch.Tensor | None,
    *,
    do_expand: bool,
    allow_multiple_reduction: bool = True,
) -> None:
    """What a combine of exactly the received rows and weights returned."""
    topk_idx, row_idx = problem.topk_idx[rank].long(), problem.row_idx(rank)
    num_ranks, is_picked = len(problem.topk_idx), topk_idx >= 0
    rank_of_entry = torch.where(is_picked, topk_idx // problem.num_local_experts, num_ranks)
    counts = torch.nn.functional.one_hot(rank_of_entry, num_ranks + 1).sum(1)[:, :num_ranks]
    x = problem.rows(row_idx).double()
    if do_expand and not allow_multiple_reduction:
        total = x * counts.sum(1, keepdim=True)
    else:
        # Each rank's sum is rounded before it travels; a row alone stays as it is.
        of_ranks = [(x * (counts[:, [peer]] if do_expand else counts[:, [peer]] > 0)) for peer in range(num_ranks)]
        rounded = torch.stack([part.to(problem.dtype).double() for part in of_ranks])
        if SETTING.ranks_per_node and allow_multiple_reduction:
            # So is the sum of each node.
            of_nodes = rounded.view(num_ranks // SETTING.ranks_per_node, SETTING.ranks_per_node, *x.shape).sum(1)
            rounded = of_nodes.to(problem.dtype).double()
        total = rounded.sum(0)
    assert_bits_equal(combined, total.to(problem.dtype), "combined_x")
    if combined_weights is not None:
        expected = torch.where(is_picked, problem.weights(row_idx), 0.0)
        assert_bits_equal(combined_weights, expected, "combined weights")
