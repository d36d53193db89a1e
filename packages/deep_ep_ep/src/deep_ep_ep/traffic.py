"""Owns the count of rows that dispatch and combine put on each kind of link: of a given routing, and on average.

It is arithmetic: no operation uses it. Tests hold the counters of a network against it, benchmarks turn times into
rates with it, and the planning for thousands of ranks is checked with it.

Nodes are the scale-up domains: rank `r` has place `r % V` in node `r // V`. NVLink joins the ranks of a node, the
network all others. What a rank sends to itself crosses no link and is not counted.

Direct mode: a row for each (token, rank), over NVLink inside the token's node and over the network else. Hybrid mode: a
row for each (token, other node) over the network, to the rank at the sender's place there, the token's forwarder; and
from each forwarder (in the own node, the sender) a row for each rank over NVLink. A combine moves the same rows the
other way, more where they are not added up as early as they could be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep_core.errors import ConfigError
from deep_ep_core.topology import Topology
from deep_ep_ep.sm_model import expected_num_groups

__all__ = ["LinkTraffic", "RowPaths", "combine_traffic", "dispatch_traffic", "expected_network_rows"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowPaths:
    """Rows that cross one kind of link, each with its ends.

    Attributes:
        num_ranks: Ranks in the group, N.
        from_rank: `[num_rows]` int64: where each row comes from.
        to_rank: `[num_rows]` int64: where it goes.
    """

    num_ranks: int
    from_rank: torch.Tensor
    to_rank: torch.Tensor

    @property
    def num_rows(self) -> int:
        """Rows of all ranks."""
        return self.from_rank.numel()

    def num_sent(self) -> torch.Tensor:
        """`[N]` int64: rows that leave each rank."""
        return torch.bincount(self.from_rank, minlength=self.num_ranks)

    def num_received(self) -> torch.Tensor:
        """`[N]` int64: rows that come to each rank."""
        return torch.bincount(self.to_rank, minlength=self.num_ranks)

    def num_between(self) -> torch.Tensor:
        """`[N, N]` int64: rows from each rank (first axis) to each rank."""
        pair = self.from_rank * self.num_ranks + self.to_rank
        return torch.bincount(pair, minlength=self.num_ranks**2).view(self.num_ranks, self.num_ranks)

    def num_puts(self, rows_per_put: int) -> torch.Tensor:
        """`[N, N]` int64: puts from each rank to each rank, if one carries at most so many rows."""
        return (self.num_between() + rows_per_put - 1) // rows_per_put

    def reversed(self) -> RowPaths:
        """The same rows, the other way."""
        return RowPaths(num_ranks=self.num_ranks, from_rank=self.to_rank, to_rank=self.from_rank)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinkTraffic:
    """The rows of one operation of all ranks.

    Attributes:
        nvlink: Those inside nodes.
        network: Those between nodes; in hybrid mode each stays on its rail.
    """

    nvlink: RowPaths
    network: RowPaths


def dispatch_traffic(
    topk_idx: torch.Tensor, *, num_experts: int, num_scaleup_ranks: int, is_hybrid: bool
) -> LinkTraffic:
    """The rows that a dispatch moves.

    Args:
        topk_idx: `[num_ranks, num_tokens, num_topk]` integers: the routing of all ranks, negative for "none".
        num_experts: Experts of all ranks, a multiple of the ranks.
        num_scaleup_ranks: Ranks of a node, V; divides the ranks.
        is_hybrid: Whether a token crosses the network once a node, to be passed on there; else once a rank.

    Raises:
        TopologyError: The nodes would not be alike.
        ConfigError: The ranks would not have equally many experts, or an expert does not exist.
    """
    token, dst = _distinct_targets(topk_idx, num_experts, num_scaleup_ranks)
    return _way_out(topk_idx, token, dst, num_scaleup_ranks, is_hybrid=is_hybrid, once_a_node=True)


def combine_traffic(
    topk_idx: torch.Tensor,
    *,
    num_experts: int,
    num_scaleup_ranks: int,
    is_hybrid: bool,
    reduces_in_node: bool = True,
    by_entry: bool = False,
) -> LinkTraffic:
    """The rows that a combine moves.

    Args:
        topk_idx: As `dispatch_traffic` takes it.
        num_experts: As there.
        num_scaleup_ranks: As there.
        is_hybrid: Whether rows of another node come through the token's forwarder there.
        reduces_in_node: Whether the forwarder adds them up first (`allow_multiple_reduction`). Hybrid mode only.
        by_entry: Whether the rank of the experts gives a row for each entry of `topk_idx`, and not one for all entries
            of a token: expert-major rows that nobody adds up before they travel.

    Raises:
        TopologyError, ConfigError: As `dispatch_traffic`.
    """
    find = _targets if by_entry else _distinct_targets
    token, dst = find(topk_idx, num_experts, num_scaleup_ranks)
    out = _way_out(topk_idx, token, dst, num_scaleup_ranks, is_hybrid=is_hybrid, once_a_node=reduces_in_node)
    return LinkTraffic(nvlink=out.nvlink.reversed(), network=out.network.reversed())


def expected_network_rows(
    num_ranks: int, num_scaleup_ranks: int, *, num_experts: int, num_topk: int, is_hybrid: bool
) -> float:
    """Rows that a token puts on the network on average, if it picks distinct experts, all equally likely.

    Hybrid: the nodes that it reaches, less its own, which by symmetry is one in S of them. Direct: the ranks that it
    reaches, less those of its own node, by the same share. It holds for a dispatch, and for a combine that adds up as
    early as it may.

    Args:
        num_ranks: Ranks in the group.
        num_scaleup_ranks: Ranks of a node; divides them, S times.
        num_experts: Experts of all ranks, a multiple of the ranks.
        num_topk: Experts that a token picks.
        is_hybrid: See `dispatch_traffic`.

    Raises:
        TopologyError: The nodes would not be alike.
        ConfigError: The ranks would not have equally many experts, or a token picks more than there are.
    """
    num_nodes = Topology(rank=0, num_ranks=num_ranks, num_scaleup_ranks=num_scaleup_ranks).num_scaleout_ranks
    num_reached = expected_num_groups(num_nodes if is_hybrid else num_ranks, num_experts, num_topk)
    return num_reached * (1 - 1 / num_nodes)


def _way_out(
    topk_idx: torch.Tensor,
    token: torch.Tensor,
    dst: torch.Tensor,
    num_scaleup_ranks: int,
    *,
    is_hybrid: bool,
    once_a_node: bool,
) -> LinkTraffic:
    """What crosses links where each token goes out to each of its `dst`."""
    num_ranks, num_tokens = topk_idx.shape[:2]
    source = token // num_tokens
    if not is_hybrid:
        is_near = source // num_scaleup_ranks == dst // num_scaleup_ranks
        return LinkTraffic(
            nvlink=_crossing(source[is_near], dst[is_near], num_ranks),
            network=_crossing(source[~is_near], dst[~is_near], num_ranks),
        )
    # In the token's own node this is the source itself.
    forwarder = dst - dst % num_scaleup_ranks + source % num_scaleup_ranks
    nvlink = _crossing(forwarder, dst, num_ranks)
    if once_a_node:
        # A token has one forwarder a node.
        crossing = torch.unique(token * num_ranks + forwarder)
        source, forwarder = crossing // num_ranks // num_tokens, crossing % num_ranks
    return LinkTraffic(nvlink=nvlink, network=_crossing(source, forwarder, num_ranks))


def _crossing(from_rank: torch.Tensor, to_rank: torch.Tensor, num_ranks: int) -> RowPaths:
    """Paths without those that end where they begin."""
    is_crossing = from_rank != to_rank
    return RowPaths(num_ranks=num_ranks, from_rank=from_rank[is_crossing], to_rank=to_rank[is_crossing])


def _targets(topk_idx: torch.Tensor, num_experts: int, num_scaleup_ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(source rank * num_tokens + token, target rank) of each entry that is not "none"."""
    num_ranks, num_topk = topk_idx.size(0), topk_idx.size(2)
    # Nodes must be alike.
    Topology(rank=0, num_ranks=num_ranks, num_scaleup_ranks=num_scaleup_ranks)
    if num_experts % num_ranks:
        raise ConfigError(f"num_experts must be a multiple of the {num_ranks} ranks (got {num_experts})")
    idx = topk_idx.reshape(-1).to(torch.int64)
    if idx.numel() and int(idx.max()) >= num_experts:
        raise ConfigError(f"topk_idx entries must be below num_experts = {num_experts} (got {int(idx.max())})")
    (entry,) = torch.nonzero(idx >= 0, as_tuple=True)
    return entry // num_topk, idx[entry] // (num_experts // num_ranks)


def _distinct_targets(
    topk_idx: torch.Tensor, num_experts: int, num_scaleup_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of each (token, target rank), once."""
    token, dst = _targets(topk_idx, num_experts, num_scaleup_ranks)
    num_ranks = topk_idx.size(0)
    pair = torch.unique(token * num_ranks + dst)
    return pair // num_ranks, pair % num_ranks
