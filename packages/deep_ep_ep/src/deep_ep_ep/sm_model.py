"""Owns the estimate of how many SMs and QPs an operation needs. It measures nothing and asks no device.

The model balances two rates. A kernel on n SMs can read and write `n * rate` bytes a second; the slowest link can
carry so many. The number of SMs is where the SMs stop being the slower of the two, plus a quarter.

How much crosses a link follows from the gate: a token that picks `num_topk` distinct experts, all equally likely,
hits an expected number of distinct ranks (and nodes), which is the textbook count of distinct groups in draws without
replacement. Volumes are in units of what a rank reads from its receive region, which is tokens times expected ranks
times bytes a token.

What it ignores: imbalance of experts and group-limited gates, latency (so it says nothing for small batches), the
token's dtype, the expert-major layout, `allow_multiple_reduction`, and the reduction after combine.
"""

from __future__ import annotations

import functools
import math
import warnings
from dataclasses import dataclass

from deep_ep_core.errors import ConfigError

__all__ = [
    "ASSUMED_NVLINK_GBS",
    "ASSUMED_RDMA_GBS",
    "DeviceSms",
    "LinkDomains",
    "LinkRates",
    "expected_num_groups",
    "theoretical_num_qps",
    "theoretical_num_sms",
]

ASSUMED_NVLINK_GBS = 430.0
"""NVLink rate taken when it is unknown, GB/s each way: 18 links of 26.56 GB/s (H100, H200), at 90 %, rounded."""

ASSUMED_RDMA_GBS = 50.0
"""RDMA rate taken when it is unknown, GB/s each way: one 400 Gb/s port for each GPU."""

# Part of the published behaviour of DeepEP, so that both give the same numbers.
_SAFETY_FACTOR = 1.25
_MIN_NUM_SMS = 4
_MIN_NUM_SMS_WITHOUT_OVERLAP = 64
_HYBRID_QPS_PER_SM = 16
_MAX_DIRECT_QPS = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """What one GPU's links carry, in GB/s (1e9 bytes), each way.

    Attributes:
        nvlink_gbs: Total over the GPU's NVLinks, or None when unknown.
        rdma_gbs: Total over the network ports that serve the GPU, or None when unknown.

    Raises:
        ConfigError: A rate that is not positive and finite. An unknown rate is None, never 0.
    """

    nvlink_gbs: float | None
    rdma_gbs: float | None

    def __post_init__(self) -> None:
        if self.nvlink_gbs is not None:
            _check_rate("nvlink_gbs", self.nvlink_gbs, "; pass None when it is unknown")
        if self.rdma_gbs is not None:
            _check_rate("rdma_gbs", self.rdma_gbs, "; pass None when it is unknown")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkDomains:
    """How the ranks of a group are joined, and which of the two levels an operation uses.

    Attributes:
        num_scaleout_ranks: Nodes that data crosses in hybrid mode; 1 in direct mode.
        num_scaleup_ranks: Ranks within a node in hybrid mode; all ranks in direct mode.
        num_nvlink_ranks: Ranks in one NVLink domain.

    Raises:
        ConfigError: A count below 1, NVLink domains that do not divide the ranks, or in hybrid mode a scale-up domain
            that is not the NVLink domain.
    """

    num_scaleout_ranks: int
    num_scaleup_ranks: int
    num_nvlink_ranks: int

    def __post_init__(self) -> None:
        for name in ("num_scaleout_ranks", "num_scaleup_ranks", "num_nvlink_ranks"):
            _check_positive(name, getattr(self, name))
        if self.num_ranks % self.num_nvlink_ranks:
            raise ConfigError(f"num_nvlink_ranks must divide the {self.num_ranks} ranks (got {self.num_nvlink_ranks})")
        if self.num_scaleout_ranks > 1 and self.num_scaleup_ranks != self.num_nvlink_ranks:
            raise ConfigError(
                f"num_scaleup_ranks must equal num_nvlink_ranks, {self.num_nvlink_ranks}, with "
                f"{self.num_scaleout_ranks} scale-out ranks (got {self.num_scaleup_ranks}); in direct mode pass "
                "num_scaleout_ranks=1"
            )

    @property
    def num_ranks(self) -> int:
        """Ranks in the group."""
        return self.num_scaleout_ranks * self.num_scaleup_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSms:
    """What the SMs of one GPU offer.

    Attributes:
        num_sms: SMs that the device has, or None for no cap, for example where there is no GPU.
        read_gbs: GB/s that one SM reads.
        write_gbs: GB/s that one SM writes.

    Raises:
        ConfigError: A value that is not positive and finite.
    """

    num_sms: int | None = None
    read_gbs: float = 200.0
    write_gbs: float = 50.0

    def __post_init__(self) -> None:
        if self.num_sms is not None:
            _check_positive("num_sms", self.num_sms)
        _check_rate("read_gbs", self.read_gbs)
        _check_rate("write_gbs", self.write_gbs)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Volumes:
    """Bytes that a rank reads, writes and sends over each kind of link, in units of its receive region."""

    read: float
    write: float
    nvlink: float
    rdma: float


def expected_num_groups(num_groups: int, num_experts: int, num_topk: int) -> float:
    """Expected number of distinct groups that a token reaches.

    Split `num_experts` experts in equal groups and draw `num_topk` distinct ones, all equally likely. A group of
    `s = num_experts / num_groups` experts is missed with probability
    `C(num_experts - s, num_topk) / C(num_experts, num_topk)` (draws without replacement), so the expectation is
    `num_groups * (1 - that)`. Evaluated in integers and rounded once.

    Args:
        num_groups: Ranks or nodes, at least 1.
        num_experts: Experts in all groups together, a multiple of `num_groups`.
        num_topk: Experts that a token picks, 1 to `num_experts`.

    Returns:
        A number from 1 to `min(num_groups, num_topk)`.

    Raises:
        ConfigError: A value out of range, or experts that do not divide evenly.
    """
    _check_positive("num_groups", num_groups)
    _check_positive("num_experts", num_experts)
    if num_experts % num_groups:
        raise ConfigError(
            f"num_experts must be a multiple of the number of groups, {num_groups} (got {num_experts}); "
            "every rank must hold equally many experts"
        )
    if not 1 <= num_topk <= num_experts:
        raise ConfigError(f"num_topk must be 1 to num_experts, {num_experts} (got {num_topk})")
    num_draws = math.comb(num_experts, num_topk)
    num_missing_draws = math.comb(num_experts - num_experts // num_groups, num_topk)
    return num_groups * (num_draws - num_missing_draws) / num_draws


def theoretical_num_sms(
    domains: LinkDomains,
    rates: LinkRates,
    *,
    num_experts: int,
    num_topk: int,
    device: DeviceSms | None = None,
    prefer_overlap_with_compute: bool = True,
) -> int:
    """Estimate how many SMs keep the slowest link busy.

    The slowest link is the one that needs more time for what crosses it, NVLink or RDMA, in direct and hybrid mode
    alike. A rate that is unknown but matters is assumed (`ASSUMED_NVLINK_GBS`, `ASSUMED_RDMA_GBS`), and a
    `RuntimeWarning` says so, once a process and rate. A rank alone sends nothing over a link: what it copies to
    itself is counted at the NVLink rate.

    Pure arithmetic. Collective: no; ranks that pass the same values get the same number.

    Args:
        domains: How the ranks are joined.
        rates: What the links carry.
        num_experts: Experts on all ranks together, a multiple of the number of ranks.
        num_topk: Experts that a token picks, 1 to `num_experts`.
        device: What the SMs offer; None for the defaults of `DeviceSms`, that is no cap.
        prefer_overlap_with_compute: Leave SMs to kernels that run at the same time. False asks for at least 64.

    Returns:
        An even number of at least 4 (or 64), cut to the device's SMs. It is odd only on a device with one SM.

    Raises:
        ConfigError: Counts out of range, or experts that do not divide evenly over ranks or nodes.

    Source: the counting argument of `expected_num_groups`; volumes and constants as in DeepEP's published model,
        which in direct mode leaves RDMA out, takes an unknown rate for 0, and gives a one-rank NVLink domain every SM.
    """
    device = device or DeviceSms()
    volumes = _volumes(domains, num_experts, num_topk)
    seconds_per_gb = max(
        volumes.nvlink / _known_rate("NVLink", rates.nvlink_gbs, ASSUMED_NVLINK_GBS) if volumes.nvlink else 0.0,
        volumes.rdma / _known_rate("RDMA", rates.rdma_gbs, ASSUMED_RDMA_GBS) if volumes.rdma else 0.0,
    )
    exact_num_sms = max(volumes.read / device.read_gbs, volumes.write / device.write_gbs) / seconds_per_gb

    num_sms = max(math.ceil(_SAFETY_FACTOR * exact_num_sms), _MIN_NUM_SMS)
    if not prefer_overlap_with_compute:
        num_sms = max(num_sms, _MIN_NUM_SMS_WITHOUT_OVERLAP)
    num_sms += num_sms % 2
    if device.num_sms is not None and num_sms > device.num_sms:
        num_sms = max(1, device.num_sms - device.num_sms % 2)
    return num_sms


def theoretical_num_qps(num_sms: int, *, allow_hybrid_mode: bool, num_allocated_qps: int) -> int:
    """Estimate how many network contexts (QPs) a kernel on `num_sms` SMs uses well.

    Hybrid: one for each of 16 channels of an SM, and one for the exchange of counts. Direct: one for each SM,
    at most 9.

    Args:
        num_sms: SMs of the kernel, at least 1.
        allow_hybrid_mode: What the buffer was made with; it counts even where all ranks share one node.
        num_allocated_qps: QPs that the buffer has, at least 1.

    Returns:
        A number from 1 to `num_allocated_qps`.

    Raises:
        ConfigError: A value out of range.
    """
    _check_positive("num_sms", num_sms)
    _check_positive("num_allocated_qps", num_allocated_qps)
    num_qps = _HYBRID_QPS_PER_SM * num_sms + 1 if allow_hybrid_mode else min(num_sms, _MAX_DIRECT_QPS)
    return min(num_qps, num_allocated_qps)


def _volumes(domains: LinkDomains, num_experts: int, num_topk: int) -> _Volumes:
    num_ranks = domains.num_ranks
    num_nvlink_ranks = domains.num_nvlink_ranks
    num_ranks_hit = expected_num_groups(num_ranks, num_experts, num_topk)
    # A token is read once, however many ranks it goes to.
    token = 1 / num_ranks_hit
    if domains.num_scaleout_ranks > 1:
        num_nodes = domains.num_scaleout_ranks
        num_nodes_hit = expected_num_groups(num_nodes, num_experts, num_topk)
        # Per token: staged once, put on the wire to each other node it hits, kept locally where it hits its own; a
        # forwarder reads it once a node it hits and writes it to each rank.
        return _Volumes(
            read=(1 + num_nodes_hit) * token,
            write=(1 + num_nodes_hit / num_nodes) * token + 1,
            nvlink=1 - 1 / domains.num_scaleup_ranks,
            rdma=num_nodes_hit * (1 - 1 / num_nodes) * token,
        )
    # Stores reach the ranks of the own NVLink domain. For the others a token is staged once, and the NIC reads it
    # from there.
    is_staged = num_nvlink_ranks < num_ranks
    return _Volumes(
        read=token,
        write=(token if is_staged else 0.0) + num_nvlink_ranks / num_ranks,
        nvlink=(num_nvlink_ranks - 1) / num_ranks if num_ranks > 1 else 1.0,
        rdma=(num_ranks - num_nvlink_ranks) / num_ranks,
    )


def _known_rate(link: str, rate_gbs: float | None, assumed_gbs: float) -> float:
    if rate_gbs is not None:
        return rate_gbs
    _warn_of_assumed_rate(link, assumed_gbs)
    return assumed_gbs


@functools.cache
def _warn_of_assumed_rate(link: str, assumed_gbs: float) -> None:
    """Warn, the first time that a link's rate is found to be unknown."""
    warnings.warn(
        f"the {link} bandwidth of this machine is unknown, so {assumed_gbs:g} GB/s is assumed when choosing the number "
        "of SMs; pass num_sms, or the rate, if that is far off",
        RuntimeWarning,
        stacklevel=4,  # This function, _known_rate, theoretical_num_sms: the caller of the latter.
    )


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{name} must be at least 1 (got {value})")


def _check_rate(name: str, rate_gbs: float, advice: str = "") -> None:
    if not (math.isfinite(rate_gbs) and rate_gbs > 0):
        raise ConfigError(f"{name} must be a positive number of GB/s (got {rate_gbs}){advice}")
