"""Every call of V1 on eight ranks, as many as V1 has in a node. What each checks is told where it is defined."""

import legacy_cases
import legacy_low_latency

NORMAL = (
    legacy_cases.check_layout,
    legacy_cases.check_dispatch_without_topk,
    legacy_cases.check_combine,
    legacy_cases.check_gradients,
    legacy_cases.check_events,
    legacy_cases.check_handle,
    legacy_cases.check_worst_tokens,
)
LOW_LATENCY = (
    legacy_low_latency.check_sizes,
    legacy_low_latency.check_hooks_in_any_order,
    legacy_low_latency.check_out_and_zero_copy,
    legacy_low_latency.check_logfmt,
    legacy_low_latency.check_stats,
    legacy_low_latency.check_rank_masked_after_dispatch_is_left_out,
)


def test_normal_calls_are_right_on_eight_ranks(rank_pool):
    ranks = rank_pool(8)
    for check in NORMAL:
        ranks.run(check)
    for kind in ("bf16", "fp8"):
        ranks.run(legacy_cases.check_dispatch, kind)


def test_low_latency_calls_are_right_on_eight_ranks(rank_pool):
    ranks = rank_pool(8)
    for check in LOW_LATENCY:
        ranks.run(check, timeout_s=60)
