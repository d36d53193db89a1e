"""Low-latency calls on CPU ranks against plain torch, to the bit."""

import legacy_low_latency
import pytest


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_format_finished_in_every_way_matches_plain_torch(rank_pool, num_ranks):
    """bfloat16, FP8, rounded FP8 and UE8M0; waited for, with an event, with a hook."""
    assert rank_pool(num_ranks).run(legacy_low_latency.check_modes) == [12] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_tokens_and_any_routing_matches_plain_torch(rank_pool, num_ranks):
    rank_pool(num_ranks).run(legacy_low_latency.check_sizes)


@pytest.mark.parametrize(
    "check",
    [
        legacy_low_latency.check_hooks_in_any_order,
        legacy_low_latency.check_out_and_zero_copy,
        legacy_low_latency.check_inference_mode,
        legacy_low_latency.check_zero_copy_needs_its_turn,
        legacy_low_latency.check_logfmt,
        legacy_low_latency.check_stats,
        legacy_low_latency.check_repeated,
        legacy_low_latency.check_rank_masked_after_dispatch_is_left_out,
    ],
    ids=lambda check: check.__name__,
)
def test_a_call_keeps_its_promise(rank_pool, check):
    rank_pool(4).run(check)


def test_masked_rank_is_left_out_and_not_waited_for(rank_pool):
    """Far below the timeout of 60 s."""
    assert max(rank_pool(4).run(legacy_low_latency.check_masked_rank_is_left_out)) < 30


def test_late_rank_is_masked_where_there_is_a_mask(rank_pool):
    masks = rank_pool(4).run(legacy_low_latency.check_late_rank_is_masked, 2.0)
    assert masks == [[0, 0, 0, 1]] * 3 + [[0] * 4]


def test_dead_rank_is_masked_where_there_is_a_mask(rank_pool):
    outcomes = rank_pool(4).run_catching(legacy_low_latency.check_dead_rank_is_masked)
    assert outcomes[3].died
    assert [outcome.value for outcome in outcomes[:3]] == [[0, 0, 0, 1]] * 3, outcomes
