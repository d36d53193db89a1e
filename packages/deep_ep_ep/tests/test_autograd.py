"""Gradients of dispatch and combine, and compiled blocks."""

import shutil

import ep_gradients
import pytest


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gradients_match_finite_differences_in_float64(rank_pool, num_ranks):
    """Both layouts, exact and worst-case sizes; `x`, the routing weights and the bias."""
    assert rank_pool(num_ranks).run(ep_gradients.check_gradcheck, timeout_s=240) == [4] * num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_block_equals_one_process(rank_pool, num_ranks):
    rank_pool(num_ranks).run(ep_gradients.check_sharded_equals_one_process)


def test_compiled_block_gives_the_eager_result(rank_pool):
    """Both layouts; whole with worst-case sizes and with captured dynamic shapes, with a graph break otherwise."""
    rank_pool(2).run(ep_gradients.check_compiled_variants, timeout_s=240)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile's default backend needs a C++ compiler")
def test_block_compiled_by_inductor_gives_the_eager_result(rank_pool):
    rank_pool(2).run(ep_gradients.check_compiled_block, "inductor", timeout_s=280)
