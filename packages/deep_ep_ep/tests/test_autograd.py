"""Gradients of dispatch and combine, and compiled blocks."""

import shutil

import ep_device_gradients
import ep_gradients
import pytest
import torch


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


# On the device backend

GPU_RANKS = [1, 4]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.gpu
@pytest.mark.parametrize("recv_memory", ep_device_gradients.RECV_MEMORIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_ranks", GPU_RANKS)
def test_device_gradients_equal_the_collective_ones_to_the_bit(gpu_rank_pool, num_ranks, dtype, recv_memory):
    """Both layouts, exact and worst-case sizes, with and without weights and bias; gradients of gradients too."""
    ranks = gpu_rank_pool(num_ranks)
    assert ranks.run(ep_device_gradients.check_gradients, dtype, recv_memory, timeout_s=240) == [8] * num_ranks


@pytest.mark.gpu
@pytest.mark.parametrize("recv_memory", ep_device_gradients.RECV_MEMORIES)
@pytest.mark.parametrize("num_ranks", GPU_RANKS)
def test_a_graph_of_forward_and_backward_serves_other_tokens(gpu_rank_pool, num_ranks, recv_memory):
    """Without CPU sync; each replay equals the collective backend to the bit, so nothing was read on the host."""
    gpu_rank_pool(num_ranks).run(ep_device_gradients.check_graph, torch.bfloat16, recv_memory, timeout_s=240)


@pytest.mark.gpu
def test_device_plans_pass_through_operators_as_the_kernels_made_them(gpu_rank_pool):
    gpu_rank_pool(4).run(ep_device_gradients.check_plans, "auto")


@pytest.mark.gpu
def test_compiled_steps_on_the_device_backend_give_the_same(gpu_rank_pool):
    gpu_rank_pool(4).run(ep_device_gradients.check_compiled, torch.float32, "auto", timeout_s=240)


@pytest.mark.gpu
def test_compiled_block_on_the_device_backend_gives_the_eager_result(gpu_rank_pool):
    gpu_rank_pool(4).run(ep_device_gradients.check_compiled_block, "auto", timeout_s=240)


@pytest.mark.gpu
def test_calls_that_the_kernels_do_not_take_have_gradients_too(gpu_rank_pool):
    """Float64 weights, as gradient checks use them: the collective backend takes them, also in a compiled program."""
    gpu_rank_pool(4).run(ep_device_gradients.check_fallback, "auto", timeout_s=240)
