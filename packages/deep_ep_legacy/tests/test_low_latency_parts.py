"""Sizes and casts of low latency, without ranks."""

import pytest
import torch

from deep_ep_core.errors import ConfigError
from deep_ep_legacy.low_latency import LowLatencySession
from deep_ep_legacy.low_latency_fp8 import cast_rows_to_fp8, pack_ue8m0
from deep_ep_legacy.low_latency_layout import sum_in_topk_order


@pytest.mark.parametrize(("num_experts", "num_bytes"), [(288, 2_146_961_792), (256, 1_908_410_496)])
@pytest.mark.parametrize("num_ranks", [1, 8])
def test_size_hint_is_that_of_v1(num_experts, num_bytes, num_ranks):
    assert LowLatencySession.get_low_latency_rdma_size_hint(128, 7168, num_ranks, num_experts) == num_bytes


def test_size_hint_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="hidden must be at least 1"):
        LowLatencySession.get_low_latency_rdma_size_hint(128, 0, 8, 256)


def test_largest_of_each_group_is_cast_to_the_largest_of_fp8():
    x = torch.randn(5, 512).to(torch.bfloat16)
    payload, scales = cast_rows_to_fp8(x, round_scale=False)
    amax = x.float().view(5, 4, 128).abs().amax(-1)
    assert torch.equal(payload.float().view(5, 4, 128).abs().amax(-1), torch.full((5, 4), 448.0))
    torch.testing.assert_close(scales * 448, amax)


def test_zeros_have_a_scale():
    payload, scales = cast_rows_to_fp8(torch.zeros(1, 128, dtype=torch.bfloat16), round_scale=False)
    assert bool((payload.float() == 0).all())
    assert scales.item() == pytest.approx(1e-4 / 448)


@pytest.mark.parametrize(("amax", "exponent"), [(448.0, 0), (224.0, -1), (450.0, 1), (1.0, -8), (0.875, -9)])
def test_rounded_scale_is_the_next_power_of_two(amax, exponent):
    """A scale that is a power of two already stays as it is."""
    x = torch.full((1, 512), amax, dtype=torch.bfloat16)
    payload, scales = cast_rows_to_fp8(x, round_scale=True)
    assert scales.tolist() == [[2.0**exponent] * 4]
    assert pack_ue8m0(scales).view(torch.uint8).tolist() == [[127 + exponent] * 4]
    assert bool((payload.float().abs() <= 448).all())


@pytest.mark.parametrize(("weights", "total"), [((2.0**24, 1, -(2.0**24)), 0), ((2.0**24, -(2.0**24), 1), 1)])
def test_sum_is_in_float32_and_in_topk_order(weights, total):
    """2^24 + 1 is 2^24 in float32, so the order decides what is left."""
    rows = torch.ones(3, 4, dtype=torch.bfloat16)
    out = torch.empty(2, 4, dtype=torch.bfloat16)
    row_of_entry = torch.tensor([[2, 0, 1], [-1, -1, -1]])
    sum_in_topk_order(rows, row_of_entry, torch.tensor([weights, weights]), out)
    assert out.tolist() == [[total] * 4, [0] * 4]
