from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from deep_ep_core.errors import ConfigError
from deep_ep_ep import sm_model
from deep_ep_ep.sm_model import (
    ASSUMED_NVLINK_GBS,
    ASSUMED_RDMA_GBS,
    DeviceSms,
    LinkDomains,
    LinkRates,
    expected_num_groups,
    theoretical_num_qps,
    theoretical_num_sms,
)

HOPPER = LinkRates(nvlink_gbs=430.3, rdma_gbs=50.0)
BLACKWELL = LinkRates(nvlink_gbs=810.0, rdma_gbs=50.0)


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    """Each test is a new process as far as the once-only warnings go."""
    sm_model._warn_of_assumed_rate.cache_clear()
    yield
    sm_model._warn_of_assumed_rate.cache_clear()


def direct(num_ranks: int, num_nvlink_ranks: int) -> LinkDomains:
    return LinkDomains(num_scaleout_ranks=1, num_scaleup_ranks=num_ranks, num_nvlink_ranks=num_nvlink_ranks)


def hybrid(num_ranks_per_node: int, num_nodes: int) -> LinkDomains:
    return LinkDomains(
        num_scaleout_ranks=num_nodes, num_scaleup_ranks=num_ranks_per_node, num_nvlink_ranks=num_ranks_per_node
    )


def num_sms(domains: LinkDomains, rates: LinkRates = HOPPER, **changes: Any) -> int:
    return theoretical_num_sms(domains, rates, **{"num_experts": 256, "num_topk": 8, **changes})


@pytest.mark.parametrize("num_experts", [4, 6, 12])
@pytest.mark.parametrize("num_topk", [1, 2, 3, 4])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_expected_groups_is_the_mean_over_all_draws(num_groups: int, num_topk: int, num_experts: int) -> None:
    group_experts = num_experts // num_groups
    counts = [
        len({expert // group_experts for expert in draw})
        for draw in itertools.combinations(range(num_experts), num_topk)
    ]
    assert expected_num_groups(num_groups, num_experts, num_topk) == pytest.approx(sum(counts) / len(counts), rel=1e-15)


def test_expected_groups_at_the_edges() -> None:
    assert expected_num_groups(1, 256, 8) == 1.0
    assert expected_num_groups(8, 256, 1) == 1.0
    assert expected_num_groups(8, 8, 5) == 5.0  # One expert a group: draws without replacement never meet.
    assert expected_num_groups(4, 256, 256) == 4.0
    assert expected_num_groups(2, 8, 5) == 2.0  # More choices than one group has experts.


def test_expected_groups_of_huge_gates_does_not_overflow() -> None:
    """C(2048, 1024) is far over the largest double."""
    assert expected_num_groups(1024, 2048, 1024) == pytest.approx(1024 * (1 - 1023 / 2047 / 2), rel=1e-15)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3, 256, 8), "multiple of the number of groups, 3 .got 256."),
        ((8, 4, 2), "multiple of the number of groups"),
        ((8, 256, 0), "num_topk must be 1 to num_experts, 256"),
        ((8, 256, 257), "got 257"),
        ((0, 256, 8), "num_groups"),
        ((1, 0, 1), "num_experts"),
    ],
)
def test_impossible_gate_is_refused(arguments: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        expected_num_groups(*arguments)


@pytest.mark.parametrize(
    ("domains", "rates", "num_topk", "expected"),
    [
        pytest.param(direct(8, 8), HOPPER, 8, 14, id="8 on NVLink"),
        pytest.param(direct(8, 8), HOPPER, 6, 14, id="8 on NVLink, top-6"),
        pytest.param(direct(2, 2), HOPPER, 8, 22, id="2 on NVLink"),
        pytest.param(direct(8, 8), BLACKWELL, 8, 24, id="8 on faster NVLink"),
        pytest.param(hybrid(8, 2), HOPPER, 8, 12, id="2 nodes of 8"),
        pytest.param(hybrid(8, 4), HOPPER, 8, 6, id="4 nodes of 8"),
    ],
)
def test_num_sms_matches_the_published_values(
    domains: LinkDomains, rates: LinkRates, num_topk: int, expected: int
) -> None:
    assert num_sms(domains, rates, num_topk=num_topk) == expected


def test_one_node_of_eight_by_hand() -> None:
    """Write 1 at 50 GB/s an SM against 7/8 at 430.3 GB/s: 430.3 * 8/7 / 50 = 9.84 SMs, a quarter more is 12.3."""
    assert math.ceil(1.25 * 430.3 * 8 / 7 / 50) == 13
    assert num_sms(direct(8, 8)) == 14


def test_direct_mode_over_several_nodes_is_bound_by_rdma() -> None:
    """16 ranks in NVLink domains of 8, no hybrid: a rank sends 7/16 over NVLink and 8/16 over RDMA.

    NVLink needs 7/16 / 430.3 = 0.0010 s a GB, RDMA 1/2 / 50 = 0.0100 s. So RDMA is what the SMs must keep up with: 100
    GB/s of the whole. They write 8/16 to NVLink peers and a staging copy of each token, 1 / phi(16), where phi(16) =
    16 (1 - C(240, 8) / C(256, 8)) = 6.523. That is 0.653 at 50 GB/s an SM: 1.31 SMs, a quarter more is 1.63, and the
    result is never below 4. (DeepEP's own model takes NVLink for the bound here, and arrives at 18.)
    """
    phi = 16 * (1 - math.comb(240, 8) / math.comb(256, 8))
    assert phi == pytest.approx(6.523, abs=0.001)
    assert 1.25 * 100 * (0.5 + 1 / phi) / 50 == pytest.approx(1.63, abs=0.01)
    assert num_sms(direct(16, 8)) == 4


def test_direct_mode_with_fast_network_is_bound_by_nvlink() -> None:
    """The same 16 ranks with 10 TB/s of RDMA: 430.3 * 16/7 * 0.653 / 50 = 12.85 SMs, a quarter more 16.1, even 18."""
    assert num_sms(direct(16, 8), LinkRates(nvlink_gbs=430.3, rdma_gbs=10_000.0)) == 18


def test_rdma_bound_grows_with_the_rdma_rate() -> None:
    """16 ranks at 400 GB/s of RDMA: 8 times 1.63 is 13.06, so 14."""
    assert num_sms(direct(16, 8), LinkRates(nvlink_gbs=10_000.0, rdma_gbs=400.0)) == 14


@pytest.mark.parametrize("domains", [direct(8, 1), hybrid(1, 8)], ids=["direct", "hybrid"])
def test_one_rank_nvlink_domain_does_not_take_all_sms(domains: LinkDomains) -> None:
    """Nothing crosses NVLink, so RDMA is the bound, and 50 GB/s needs few SMs."""
    assert num_sms(domains, device=DeviceSms(num_sms=132)) == 4


def test_rank_alone_is_counted_at_the_nvlink_rate() -> None:
    """Write 1 at 50 GB/s an SM against 1 at 430.3 GB/s: 8.6, a quarter more 10.8, so 12."""
    assert num_sms(direct(1, 1), device=DeviceSms(num_sms=132)) == 12


@pytest.mark.parametrize(("device_num_sms", "expected"), [(None, 64), (132, 64), (64, 64), (48, 48), (13, 12), (1, 1)])
def test_without_overlap_at_least_64_sms_as_far_as_the_device_has_them(
    device_num_sms: int | None, expected: int
) -> None:
    got = num_sms(direct(8, 8), prefer_overlap_with_compute=False, device=DeviceSms(num_sms=device_num_sms))
    assert got == expected


def test_without_overlap_more_than_64_where_the_links_need_it() -> None:
    fast = LinkRates(nvlink_gbs=3600.0, rdma_gbs=None)
    assert num_sms(direct(8, 8), fast, prefer_overlap_with_compute=False) == num_sms(direct(8, 8), fast) == 104


@pytest.mark.parametrize("nvlink_gbs", [1.0, 50.0, 200.0, 430.3, 810.0, 3600.0])
@pytest.mark.parametrize(
    "domains", [direct(1, 1), direct(2, 2), direct(8, 8), direct(64, 8), hybrid(8, 2), hybrid(1, 32), hybrid(8, 32)]
)
def test_result_is_even_and_at_least_four(domains: LinkDomains, nvlink_gbs: float) -> None:
    got = num_sms(domains, LinkRates(nvlink_gbs=nvlink_gbs, rdma_gbs=50.0))
    assert got % 2 == 0
    assert got >= 4


def test_slower_sms_are_more() -> None:
    """The read side decides once writing is cheap: 1 / phi(8) at 1 GB/s an SM against 7/8 at 430.3 GB/s."""
    phi = expected_num_groups(8, 256, 8)
    expected = math.ceil(1.25 * 430.3 * 8 / 7 / phi)
    got = num_sms(direct(8, 8), device=DeviceSms(read_gbs=1.0, write_gbs=1e6))
    assert got == expected + expected % 2
    assert num_sms(direct(8, 8), device=DeviceSms(write_gbs=25.0)) == 26


def test_two_nodes_bound_by_reading() -> None:
    """Two nodes of 8, slow reads: a token is read by its source and by a forwarder in each of the 1.993 nodes it hits.

    phi(16) = 6.523, so reads are 2.993 / 6.523 = 0.459. RDMA carries half of 1.993 / 6.523, at 50 GB/s in 0.00306 s;
    NVLink 7/8, at 430.3 GB/s in 0.00203 s. At 1 GB/s an SM that is 150.2 SMs, a quarter more is 187.7.
    """
    got = num_sms(hybrid(8, 2), device=DeviceSms(read_gbs=1.0, write_gbs=1e6))
    assert got == 188


def test_unknown_nvlink_rate_is_assumed_and_said() -> None:
    unknown = LinkRates(nvlink_gbs=None, rdma_gbs=None)
    with pytest.warns(RuntimeWarning, match="NVLink bandwidth .* unknown, so 430 GB/s is assumed") as caught:
        got = num_sms(direct(8, 8), unknown)
    assert got == num_sms(direct(8, 8), LinkRates(nvlink_gbs=ASSUMED_NVLINK_GBS, rdma_gbs=None)) == 14
    assert len(caught) == 1  # RDMA carries nothing here, so its rate does not matter.
    assert caught[0].filename == __file__


def test_unknown_rdma_rate_is_assumed_and_said() -> None:
    with pytest.warns(RuntimeWarning, match="RDMA bandwidth .* unknown, so 50 GB/s is assumed") as caught:
        got = num_sms(hybrid(8, 2), LinkRates(nvlink_gbs=430.3, rdma_gbs=None))
    assert got == num_sms(hybrid(8, 2), LinkRates(nvlink_gbs=430.3, rdma_gbs=ASSUMED_RDMA_GBS)) == 12
    assert len(caught) == 1


@pytest.mark.parametrize("domains", [direct(16, 8), hybrid(8, 2)], ids=["direct", "hybrid"])
def test_both_unknown_rates_are_named(domains: LinkDomains) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        num_sms(domains, LinkRates(nvlink_gbs=None, rdma_gbs=None))
    assert sorted(str(warning.message).split()[1] for warning in caught) == ["NVLink", "RDMA"]


def test_unknown_rate_is_said_once() -> None:
    """Also where the program shows every warning: the model is asked at each dispatch."""
    unknown = LinkRates(nvlink_gbs=None, rdma_gbs=None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for num_ranks in (2, 4, 8):
            num_sms(direct(num_ranks, num_ranks), unknown)
    assert len(caught) == 1


def test_known_rates_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        num_sms(hybrid(8, 2))
        num_sms(direct(8, 1), LinkRates(nvlink_gbs=None, rdma_gbs=50.0))
        num_sms(direct(8, 8), LinkRates(nvlink_gbs=430.3, rdma_gbs=None))


@pytest.mark.parametrize(
    ("domains", "num_experts", "num_topk"),
    [(direct(8, 8), 255, 8), (hybrid(8, 2), 8, 4), (direct(8, 8), 256, 0), (direct(8, 8), 8, 9)],
)
def test_impossible_gate_is_refused_by_the_model(domains: LinkDomains, num_experts: int, num_topk: int) -> None:
    with pytest.raises(ConfigError):
        num_sms(domains, num_experts=num_experts, num_topk=num_topk)


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_rate_that_is_no_rate_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"nvlink_gbs must be a positive number.*pass None when it is unknown"):
        LinkRates(nvlink_gbs=rate, rdma_gbs=None)
    with pytest.raises(ConfigError, match="rdma_gbs"):
        LinkRates(nvlink_gbs=None, rdma_gbs=rate)
    with pytest.raises(ConfigError, match="read_gbs"):
        DeviceSms(read_gbs=rate)
    with pytest.raises(ConfigError, match="write_gbs"):
        DeviceSms(write_gbs=rate)


def test_device_without_sms_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_sms must be at least 1 \(got 0\)"):
        DeviceSms(num_sms=0)


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ((1, 12, 8), "num_nvlink_ranks must divide the 12 ranks"),
        ((1, 4, 8), "num_nvlink_ranks must divide"),
        ((2, 8, 4), "num_scaleup_ranks must equal num_nvlink_ranks, 4"),
        ((0, 8, 8), "num_scaleout_ranks"),
        ((1, 0, 1), "num_scaleup_ranks"),
        ((1, 8, 0), "num_nvlink_ranks"),
    ],
)
def test_impossible_domains_are_refused(counts: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LinkDomains(num_scaleout_ranks=counts[0], num_scaleup_ranks=counts[1], num_nvlink_ranks=counts[2])


@pytest.mark.parametrize(
    ("sms", "allow_hybrid_mode", "num_allocated_qps", "expected"),
    [
        (4, False, 17, 4),
        (9, False, 17, 9),
        (24, False, 17, 9),
        (24, False, 5, 5),
        (4, True, 129, 65),
        (8, True, 129, 129),
        (12, True, 129, 129),
        (12, True, 65, 65),
        (6, True, 129, 97),
        (1, True, 129, 17),
    ],
)
def test_num_qps(sms: int, allow_hybrid_mode: bool, num_allocated_qps: int, expected: int) -> None:
    got = theoretical_num_qps(sms, allow_hybrid_mode=allow_hybrid_mode, num_allocated_qps=num_allocated_qps)
    assert got == expected


@pytest.mark.parametrize(("sms", "num_allocated_qps", "words"), [(0, 17, "num_sms"), (4, 0, "num_allocated_qps")])
def test_num_qps_of_nothing_is_refused(sms: int, num_allocated_qps: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        theoretical_num_qps(sms, allow_hybrid_mode=True, num_allocated_qps=num_allocated_qps)
