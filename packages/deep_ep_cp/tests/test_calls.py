"""All-gather and reduce-scatter on CPU ranks against plain torch, to the bit; and gradients."""

from __future__ import annotations

import cp_calls
import cp_gradients
import pytest

GRADIENT_CHECKS = [
    cp_gradients.check_gradcheck,
    cp_gradients.check_each_is_the_others_backward,
    cp_gradients.check_second_derivatives,
    cp_gradients.check_backward_in_a_session,
]


# Of the module, so that the tests of one number of ranks stand together.
@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda n: f"{n} ranks")
def num_ranks(request):
    return request.param


@pytest.mark.parametrize("check", [*cp_calls.CHECKS, *GRADIENT_CHECKS], ids=lambda check: check.__name__)
def test_calls_equal_plain_torch(rank_pool, num_ranks, check):
    rank_pool(num_ranks).run(check)


def test_sums_have_rank_order_and_one_rounding(rank_pool):
    rank_pool(4).run(cp_calls.check_sums_have_rank_order_and_one_rounding)


def test_who_wants_a_gradient_may_differ(rank_pool):
    rank_pool(4).run(cp_gradients.check_who_wants_a_gradient_may_differ)
