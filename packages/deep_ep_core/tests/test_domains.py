from __future__ import annotations

import core_domains
import pytest
import torch.distributed as dist

from deep_ep_core.domains import detect_topology
from deep_ep_core.errors import ConfigError
from deep_ep_core.topology import Topology


def topologies(num_ranks, num_scaleup_ranks):
    return [Topology(rank=rank, num_ranks=num_ranks, num_scaleup_ranks=num_scaleup_ranks) for rank in range(num_ranks)]


def test_ranks_of_one_machine_are_one_domain(rank_pool):
    assert rank_pool(4).run(core_domains.detect) == topologies(4, 4)


def test_make_believe_nodes_are_domains(rank_pool):
    assert rank_pool(4, num_nodes=2).run(core_domains.detect) == topologies(4, 2)


def test_the_answer_for_the_default_group_is_kept(rank_pool):
    answers = rank_pool(4).run(core_domains.detect_default_group)
    assert answers == [(topology, True) for topology in topologies(4, 4)]


def test_ranks_of_a_subgroup_are_counted_in_the_subgroup(rank_pool):
    assert rank_pool(4).run(core_domains.detect, [1, 3]) == [None, topologies(2, 2)[0], None, topologies(2, 2)[1]]


@pytest.mark.parametrize(("hosts", "size"), [("aaaa", 4), ("aabb", 2), ("aaab", 1), ("abab", 1), ("abba", 1)])
def test_domains_do_not_cross_hosts(rank_pool, hosts, size):
    assert rank_pool(4).run(core_domains.detect_on_hosts, hosts) == topologies(4, size)


@pytest.mark.parametrize(("team_size", "size"), [(None, 4), (1, 1), (2, 2), (4, 4)])
def test_team_size_makes_domains_smaller(rank_pool, team_size, size):
    assert rank_pool(4).run(core_domains.detect_with_team_sizes, [team_size] * 4) == topologies(4, size)


def test_team_size_that_does_not_divide_the_ranks_is_refused_on_every_rank(rank_pool):
    for outcome in rank_pool(4).run_catching(core_domains.detect_with_team_sizes, [3] * 4):
        assert outcome.error_type_name == "TopologyError"
        assert "NCCL_LSA_TEAM_SIZE must be a divisor of the number of ranks, 4 (got 3)" in outcome.error_message


def test_ranks_with_different_team_sizes_are_all_told(rank_pool):
    for outcome in rank_pool(4).run_catching(core_domains.detect_with_team_sizes, [2, 2, None, 4]):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert outcome.error_attributes["field"] == "NCCL_LSA_TEAM_SIZE"
        assert outcome.error_attributes["values"] == ("2", "2", "unset", "4")


def test_a_rank_may_ask_again_alone(rank_pool):
    """Later calls answer from memory, and leave no trace that would set this rank apart from the others."""
    assert rank_pool(4).run(core_domains.ask_again_alone) == [1, 1, 1, 1]


def test_a_process_outside_the_group_is_told_so(rank_pool):
    told = rank_pool(4).run(core_domains.detect_outside, [0, 1, 2])
    assert told[:3] == ["nothing"] * 3
    assert told[3].startswith("ConfigError: the search for domains must be made by the members of its group only")


def test_a_process_without_torch_distributed_is_told_what_to_call():
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match="the search for domains needs an initialised process group"):
        detect_topology(None)
