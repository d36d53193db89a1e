"""The normal calls of V1 give what loops over all ranks' inputs give, to the bit; with one node, and with two."""

import legacy_cases
import pytest


# Of the module, so that the tests of one shape follow each other and share their ranks.
@pytest.fixture(scope="module", params=[(2, 1), (4, 1), (4, 2)], ids=lambda shape: f"{shape[0]}_ranks_{shape[1]}_nodes")
def shape(request):
    return request.param


def test_layout_counts_what_is_selected(rank_pool, shape):
    rank_pool(*shape).run(legacy_cases.check_layout)


@pytest.mark.parametrize("kind", ["bf16", "fp8", "fp8 packed"])
def test_dispatch_and_cached_dispatch_bring_rows_in_order(rank_pool, shape, kind):
    rank_pool(*shape).run(legacy_cases.check_dispatch, kind)


def test_dispatch_without_topk_counts_by_the_layout(rank_pool, shape):
    rank_pool(*shape).run(legacy_cases.check_dispatch_without_topk)


def test_combine_sums_biases_then_ranks_and_rounds_once(rank_pool, shape):
    rank_pool(*shape).run(legacy_cases.check_combine)


def test_calls_of_a_backward_pass_are_right(rank_pool, shape):
    rank_pool(*shape).run(legacy_cases.check_gradients)


def test_events_are_given_and_taken(rank_pool, shape):
    rank_pool(*shape).run(legacy_cases.check_events)


def test_handles_tell_what_those_of_v1_tell(rank_pool, shape):
    rank_pool(*shape).run(legacy_cases.check_handle)


def test_worst_tokens_give_results_of_a_fixed_size_inside_a_node(rank_pool, shape):
    check = legacy_cases.check_worst_tokens if shape[1] == 1 else legacy_cases.check_refusals_with_several_nodes
    rank_pool(*shape).run(check)
