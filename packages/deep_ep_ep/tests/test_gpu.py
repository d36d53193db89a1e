"""Dispatch and combine on CUDA tensors: over the group's own CUDA backend, and through the host."""

import ep_gpu
import pytest

pytestmark = pytest.mark.gpu


def test_modes_match_the_reference_over_nccl(rank_pool, gpu_ranks):
    rank_pool(gpu_ranks).run(ep_gpu.check_modes, "cpu:gloo,cuda:nccl", timeout_s=280)


def test_modes_match_the_reference_through_the_host(rank_pool, gpu_ranks):
    """A gloo group carries no CUDA rows; they are staged through host memory."""
    rank_pool(gpu_ranks).run(ep_gpu.check_modes, "gloo", timeout_s=280)


def test_group_without_a_cpu_backend_works(rank_pool, gpu_ranks):
    rank_pool(gpu_ranks).run(ep_gpu.check_modes, "nccl", timeout_s=280)


def test_results_are_ordered_after_the_event(rank_pool, gpu_ranks):
    rank_pool(gpu_ranks).run(ep_gpu.check_streams, "cpu:gloo,cuda:nccl")
