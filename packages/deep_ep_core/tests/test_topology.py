from __future__ import annotations

import dataclasses
import socket

import pytest

from deep_ep_core import topology
from deep_ep_core.errors import TopologyError
from deep_ep_core.topology import Topology, host_identity, scaleup_size_from_hosts


@pytest.mark.parametrize(
    ("num_ranks", "num_scaleup_ranks", "num_scaleout_ranks"),
    [(1, 1, 1), (8, 8, 1), (8, 1, 8), (8, 4, 2), (6, 3, 2), (72, 36, 2)],
)
def test_rank_is_its_domain_times_the_domain_size_plus_its_place(num_ranks, num_scaleup_ranks, num_scaleout_ranks):
    places = []
    for rank in range(num_ranks):
        place = Topology(rank=rank, num_ranks=num_ranks, num_scaleup_ranks=num_scaleup_ranks)
        assert place.num_scaleout_ranks == num_scaleout_ranks
        assert place.scaleout_rank * num_scaleup_ranks + place.scaleup_rank == rank
        places.append((place.scaleout_rank, place.scaleup_rank))
    assert places == [(out, up) for out in range(num_scaleout_ranks) for up in range(num_scaleup_ranks)]


def test_flattened_is_one_domain_of_the_same_ranks():
    flat = Topology(rank=5, num_ranks=8, num_scaleup_ranks=4).flattened()
    assert flat == Topology(rank=5, num_ranks=8, num_scaleup_ranks=8)
    assert (flat.scaleout_rank, flat.scaleup_rank, flat.num_scaleout_ranks) == (0, 5, 1)
    assert flat.flattened() == flat


def test_a_topology_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Topology(rank=0, num_ranks=1, num_scaleup_ranks=1).rank = 1


@pytest.mark.parametrize("rank", [-1, 8, 9])
def test_rank_outside_the_group_is_refused(rank):
    with pytest.raises(TopologyError, match=rf"\[0, 8\) \(got {rank}\)"):
        Topology(rank=rank, num_ranks=8, num_scaleup_ranks=4)


@pytest.mark.parametrize("num_scaleup_ranks", [-1, 0, 3, 5, 16])
def test_domain_that_does_not_divide_the_group_is_refused_with_what_to_do(num_scaleup_ranks):
    with pytest.raises(TopologyError) as caught:
        Topology(rank=3, num_ranks=8, num_scaleup_ranks=num_scaleup_ranks)
    message = str(caught.value)
    for words in ("8 ranks", f"domains of {num_scaleup_ranks}", "on rank 3", "NCCL_LSA_TEAM_SIZE to a divisor of 8"):
        assert words in message


@pytest.mark.parametrize(
    ("hosts", "size"),
    [
        ("a", 1),
        ("aaaaaaaa", 8),
        ("aaaabbbb", 4),
        ("aabbccdd", 2),
        ("aaabbb", 3),
        # Uneven hosts still form equal domains, none of which spans two hosts.
        ("aaab", 1),
        ("aaaabb", 2),
        ("aaaaaabbb", 3),
        # So do hosts whose ranks are not together.
        ("abab", 1),
        ("aabbaabb", 2),
        ("aabbaa", 2),
        ("abbbba", 1),
    ],
)
def test_domains_are_the_largest_that_no_host_boundary_cuts(hosts, size):
    assert scaleup_size_from_hosts(list(hosts)) == size
    domains = [set(hosts[start : start + size]) for start in range(0, len(hosts), size)]
    assert all(len(hosts_of_domain) == 1 for hosts_of_domain in domains)


@pytest.mark.parametrize(
    ("hosts", "team_size", "size"),
    [
        ("aaaaaaaa", 1, 1),
        ("aaaaaaaa", 2, 2),
        ("aaaaaaaa", 8, 8),
        ("aaaabbbb", 2, 2),
        ("aaaabbbb", 4, 4),
        # A team cannot be larger than the machine allows, nor lie across two machines.
        ("aaaabbbb", 8, 4),
        ("abab", 4, 1),
        ("aaaaaabbbbbb", 4, 2),
        ("aaabbb", 2, 1),
    ],
)
def test_team_size_makes_domains_smaller(hosts, team_size, size):
    assert scaleup_size_from_hosts(list(hosts), team_size) == size


@pytest.mark.parametrize("team_size", [-2, 0, 3, 5, 16])
def test_team_size_that_does_not_divide_the_ranks_is_refused(team_size):
    with pytest.raises(TopologyError, match=rf"NCCL_LSA_TEAM_SIZE must be a divisor .* 8 \(got {team_size}\); .*unset"):
        scaleup_size_from_hosts(["a"] * 8, team_size)


def test_host_identity_is_that_of_the_boot(monkeypatch, tmp_path):
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("4a0c\n")
    monkeypatch.setattr(topology, "_BOOT_ID_PATH", boot_id)
    assert host_identity() == "4a0c"


def test_host_without_a_boot_id_is_known_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(topology, "_BOOT_ID_PATH", tmp_path / "missing")
    monkeypatch.setattr(socket, "gethostname", lambda: "node-7")
    assert host_identity() == "node-7"
