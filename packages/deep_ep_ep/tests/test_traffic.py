"""Counts of rows on links against a count by hand, token by token."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from deep_ep_core.errors import ConfigError, TopologyError
from deep_ep_ep.sm_model import expected_num_groups
from deep_ep_ep.traffic import LinkTraffic, combine_traffic, dispatch_traffic, expected_network_rows

# (ranks, ranks of a node): one node, one rank a node, and between.
GROUPS = [(1, 1), (4, 4), (4, 1), (6, 2), (8, 4)]
NUM_TOKENS, NUM_TOPK = 40, 4

Paths = Counter[tuple[int, int]]


def random_routing(num_ranks: int, num_experts: int) -> torch.Tensor:
    """Distinct experts, and some entries that select none."""
    choose = random.Random(num_ranks)
    rows = [choose.sample(range(num_experts), NUM_TOPK) for _ in range(num_ranks * NUM_TOKENS)]
    rows = [[-1 if choose.random() < 0.2 else expert for expert in row] for row in rows]
    return torch.tensor(rows).view(num_ranks, NUM_TOKENS, NUM_TOPK)


def paths_of(traffic: LinkTraffic) -> tuple[Paths, Paths]:
    """How often each pair of ranks has a row on NVLink, and on the network."""
    return tuple(  # type: ignore[return-value]
        Counter(zip(paths.from_rank.tolist(), paths.to_rank.tolist(), strict=True))
        for paths in (traffic.nvlink, traffic.network)
    )


def count_by_hand(
    topk_idx: torch.Tensor, num_local: int, node_size: int, *, is_hybrid: bool, once_a_node: bool, by_entry: bool
) -> tuple[Paths, Paths]:
    """Where each token goes, step by step."""
    nvlink: Paths = Counter()
    network: Paths = Counter()
    for source, tokens in enumerate(topk_idx.tolist()):
        for entries in tokens:
            targets = [expert // num_local for expert in entries if expert >= 0]
            for node in {target // node_size for target in targets}:
                here = [target for target in targets if target // node_size == node]
                ranks = here if by_entry else sorted(set(here))
                is_own = node == source // node_size
                forwarder = source if is_own else node * node_size + source % node_size
                if is_own or is_hybrid:
                    nvlink.update((forwarder, rank) for rank in ranks if rank != forwarder)
                if not is_own and is_hybrid:
                    network[source, forwarder] += 1 if once_a_node else len(ranks)
                if not is_own and not is_hybrid:
                    network.update((source, rank) for rank in ranks)
    return nvlink, network


def turned(paths: Paths) -> Paths:
    return Counter({(to_rank, from_rank): count for (from_rank, to_rank), count in paths.items()})


@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_dispatch_puts_a_token_once_on_each_way(num_ranks: int, node_size: int, is_hybrid: bool) -> None:
    topk_idx = random_routing(num_ranks, 4 * num_ranks)
    found = dispatch_traffic(topk_idx, num_experts=4 * num_ranks, num_scaleup_ranks=node_size, is_hybrid=is_hybrid)
    by_hand = count_by_hand(topk_idx, 4, node_size, is_hybrid=is_hybrid, once_a_node=True, by_entry=False)
    assert paths_of(found) == by_hand


@pytest.mark.parametrize("by_entry", [True, False])
@pytest.mark.parametrize("reduces_in_node", [True, False])
@pytest.mark.parametrize("is_hybrid", [True, False])
@pytest.mark.parametrize(("num_ranks", "node_size"), GROUPS)
def test_combine_brings_rows_back_on_the_same_way(
    num_ranks: int, node_size: int, is_hybrid: bool, reduces_in_node: bool, by_entry: bool
) -> None:
    topk_idx = random_routing(num_ranks, 4 * num_ranks)
    found = combine_traffic(
        topk_idx,
        num_experts=4 * num_ranks,
        num_scaleup_ranks=node_size,
        is_hybrid=is_hybrid,
        reduces_in_node=reduces_in_node,
        by_entry=by_entry,
    )
    nvlink, network = count_by_hand(
        topk_idx, 4, node_size, is_hybrid=is_hybrid, once_a_node=reduces_in_node, by_entry=by_entry
    )
    assert paths_of(found) == (turned(nvlink), turned(network))


def test_sums_of_paths_agree() -> None:
    topk_idx = random_routing(8, 16)
    network = dispatch_traffic(topk_idx, num_experts=16, num_scaleup_ranks=2, is_hybrid=False).network
    between = network.num_between()
    assert between.shape == (8, 8)
    assert torch.equal(between.sum(1), network.num_sent())
    assert torch.equal(between.sum(0), network.num_received())
    assert torch.equal(network.reversed().num_between(), between.t())
    assert int(between.sum()) == network.num_rows > 0


def test_puts_are_rows_in_groups_of_one_pair() -> None:
    network = dispatch_traffic(random_routing(4, 16), num_experts=16, num_scaleup_ranks=2, is_hybrid=True).network
    assert torch.equal(network.num_puts(1), network.num_between())
    for rows_per_put in (3, 1000):
        expected = [[-(-count // rows_per_put) for count in row] for row in network.num_between().tolist()]
        assert network.num_puts(rows_per_put).tolist() == expected


def test_routing_that_selects_nothing_or_has_no_tokens_moves_nothing() -> None:
    for topk_idx in (torch.full((4, 3, 2), -1), torch.empty(4, 0, 2, dtype=torch.int32)):
        for is_hybrid in (True, False):
            found = dispatch_traffic(topk_idx, num_experts=8, num_scaleup_ranks=2, is_hybrid=is_hybrid)
            assert found.nvlink.num_rows == found.network.num_rows == 0
            assert found.network.num_sent().tolist() == [0] * 4


def test_expectation_counts_what_leaves_the_node() -> None:
    # Two nodes of one rank with one expert each, both selected: one row to the other.
    assert expected_network_rows(2, 1, num_experts=2, num_topk=2, is_hybrid=True) == 1
    # One expert of 16 on 4 nodes of 2: elsewhere in 3 of 4 cases.
    for is_hybrid in (True, False):
        assert expected_network_rows(8, 2, num_experts=16, num_topk=1, is_hybrid=is_hybrid) == pytest.approx(0.75)
    assert expected_network_rows(8, 8, num_experts=256, num_topk=8, is_hybrid=True) == 0
    by_rank = expected_network_rows(16, 8, num_experts=256, num_topk=8, is_hybrid=False)
    assert by_rank == pytest.approx(expected_num_groups(16, 256, 8) / 2)
    assert expected_network_rows(16, 8, num_experts=256, num_topk=8, is_hybrid=True) < 1 < by_rank


def test_numbers_that_do_not_fit_together_are_refused() -> None:
    topk_idx = torch.zeros(6, 1, 1, dtype=torch.int64)
    with pytest.raises(TopologyError, match="cannot be cut into domains of 4"):
        dispatch_traffic(topk_idx, num_experts=6, num_scaleup_ranks=4, is_hybrid=True)
    with pytest.raises(ConfigError, match=r"multiple of the 6 ranks \(got 8\)"):
        combine_traffic(topk_idx, num_experts=8, num_scaleup_ranks=2, is_hybrid=True)
    with pytest.raises(ConfigError, match=r"below num_experts = 6 \(got 9\)"):
        dispatch_traffic(topk_idx + 9, num_experts=6, num_scaleup_ranks=2, is_hybrid=True)
    with pytest.raises(TopologyError):
        expected_network_rows(6, 4, num_experts=6, num_topk=1, is_hybrid=True)
