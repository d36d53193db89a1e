"""The `torch.library` operators: their registration, buffers that are gone, and gradients that are easy to miss."""

from __future__ import annotations

import ep_unit_operators
import pytest
import torch


@pytest.mark.parametrize("has_device_plans", [False, True], ids=["collective", "plans of the device backend"])
@pytest.mark.parametrize(
    ("topk_idx_dtype", "has_weights"), [(torch.int64, True), (torch.int32, False)], ids=["int64", "int32, no weights"]
)
def test_operators_are_registered_as_torch_asks(rank_pool, topk_idx_dtype, has_weights, has_device_plans):
    """Schema, fake results and autograd registration: both layouts, exact and worst-case sizes."""
    found = rank_pool(2).run(ep_unit_operators.failed_operator_checks, topk_idx_dtype, has_weights, has_device_plans)
    assert found == [[], []]


def test_plans_of_the_device_backend_pass_through_compiled_programs(rank_pool):
    """Its handles, with the collective backend moving the rows; the kernels themselves need a GPU."""
    rank_pool(2).run(ep_unit_operators.check_compiled_with_device_plans, timeout_s=240)


def test_a_plan_from_operators_knows_whether_the_metadata_was_changed(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_plan_knows_of_changed_metadata)


def test_a_compiled_block_may_meet_other_buffers(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_compiled_block_meets_other_buffers)


def test_backward_says_that_its_buffer_was_dropped(rank_pool):
    for messages in rank_pool(2).run(ep_unit_operators.errors_in_backward, is_dropped=True):
        for message in messages:
            assert "must be alive until its backward pass" in message
            assert "which was dropped" in message
            assert "keep a reference to it" in message


def test_backward_says_that_its_buffer_was_closed(rank_pool):
    for rank, messages in enumerate(rank_pool(2).run(ep_unit_operators.errors_in_backward, is_dropped=False)):
        for message in messages:
            assert f"the buffer must be open (got a closed buffer, on rank {rank})" in message


def test_a_graph_keeps_no_buffer_alive(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_saved_results_keep_no_buffer_alive)


def test_second_derivatives_equal_those_of_one_process(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_second_derivatives)


def test_second_derivatives_match_finite_differences(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_second_derivatives_by_differences)


def test_a_rank_without_tokens_takes_part_in_backward(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_rank_without_tokens_takes_part)


def test_ranks_may_use_different_results(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_ranks_may_use_different_results)


def test_no_graph_is_built_without_gradients(rank_pool):
    rank_pool(2).run(ep_unit_operators.check_detached_results_need_no_backward)
