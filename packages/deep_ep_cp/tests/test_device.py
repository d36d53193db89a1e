"""The device backend on ranks that share one GPU or have one each, bit for bit as on the collective backend.

One number of ranks after the other, so that the ranks of a number start once.
"""

from __future__ import annotations

import cp_calls
import cp_device
import cp_errors
import cp_gradients
import pytest
from cp_setting import run_on_gpu

pytestmark = pytest.mark.gpu

GRADIENT_CHECKS = (
    cp_gradients.check_gradcheck,
    cp_gradients.check_each_is_the_others_backward,
    cp_gradients.check_second_derivatives,
    cp_gradients.check_backward_in_a_session,
)
EXPECTED_WORDS = {name: words for name, (_, words) in cp_errors.REJECTIONS.items()}


def names(checks):
    return [check.__name__ for check in checks]


@pytest.fixture(scope="module", params=[2, 4, 8, 1], ids=lambda n: f"{n} ranks")
def num_ranks(request):
    return request.param


@pytest.mark.parametrize("check", cp_calls.CHECKS, ids=names(cp_calls.CHECKS))
def test_calls_equal_plain_torch(gpu_rank_pool, num_ranks, check):
    gpu_rank_pool(num_ranks).run(run_on_gpu, check, "device", timeout_s=120)


@pytest.mark.parametrize("check", GRADIENT_CHECKS, ids=names(GRADIENT_CHECKS))
def test_gradients_equal_plain_torch(gpu_rank_pool, num_ranks, check):
    gpu_rank_pool(num_ranks).run(run_on_gpu, check, "device")


@pytest.mark.parametrize("check", cp_device.CHECKS, ids=names(cp_device.CHECKS))
def test_streams_and_memory(gpu_rank_pool, num_ranks, check):
    gpu_rank_pool(num_ranks).run(run_on_gpu, check, "device")


def test_sums_have_rank_order_and_one_rounding(gpu_rank_pool):
    gpu_rank_pool(4).run(run_on_gpu, cp_calls.check_sums_have_rank_order_and_one_rounding, "device")


def test_a_thousand_random_calls_equal_plain_torch(gpu_rank_pool):
    gpu_rank_pool(4).run(run_on_gpu, cp_calls.check_random_rounds, "device", 1000, 7, timeout_s=240)


@pytest.mark.parametrize("check", cp_calls.CHECKS, ids=names(cp_calls.CHECKS))
def test_cuda_tensors_on_the_collective_backend_equal_plain_torch(gpu_rank_pool, check):
    gpu_rank_pool(4).run(run_on_gpu, check, "collective", timeout_s=120)


@pytest.mark.parametrize("late_rank", [0, 3])
def test_a_late_rank_is_named(gpu_rank_pool, late_rank):
    told = gpu_rank_pool(4).run(run_on_gpu, cp_device.come_late, "device", late_rank, 1.0, 3.0, timeout_s=60)
    for rank, text in enumerate(told):
        if rank != late_rank:
            assert text == f"({late_rank},) all_gather in session 2"
    # It finds that the others gave up, in the call behind.
    assert "session" in told[late_rank]


def test_a_late_rank_within_the_timeout_is_waited_for(gpu_rank_pool):
    told = gpu_rank_pool(4).run(run_on_gpu, cp_device.come_late, "device", 1, 30.0, 1.0, timeout_s=60)
    assert told == ["in time"] * 4


@pytest.mark.parametrize(
    ("name", "field", "shown"),
    [
        ("configuration", "num_max_session_bytes", "2048"),
        ("session", "operation", "destroy_agrs_session"),
        ("operation", "operation", "reduce_scatter"),
        ("elements", "number of elements of tensor 0", "15"),
        ("dtype", "dtype of tensor 0", "int32"),
        ("shape", "list of shapes", None),
        ("length of the batch", "number of tensors", "3"),
        ("seventh tensor", "list of shapes", None),
    ],
)
def test_ranks_that_disagree_are_all_told_who_passed_what(gpu_rank_pool, name, field, shown):
    outcomes = gpu_rank_pool(2).run_catching(run_on_gpu, cp_device.disagree, "device", 1, name, timeout_s=60)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert f"must call ContextBuffer with the same {field} " in outcome.error_message
        assert outcome.error_attributes["field"] == field
        if shown is not None:
            assert outcome.error_attributes["values"][1] == shown
        else:
            assert outcome.error_attributes["values"][1 - rank] == "others"


def test_a_disagreement_is_told_again_and_a_new_buffer_works(gpu_rank_pool):
    gpu_rank_pool(2).run(run_on_gpu, cp_device.check_disagreement_is_told_again_and_again, "device", timeout_s=60)


def test_bad_calls_are_refused_in_words_that_help(gpu_rank_pool):
    for rank, messages in enumerate(gpu_rank_pool(2).run(run_on_gpu, cp_errors.collect_rejections, "device")):
        for name, words in EXPECTED_WORDS.items():
            assert name in messages, f"rank {rank} accepted it"
            for word in words:
                # Where a message names the device of the buffer.
                assert word.replace("on cpu", "on cuda") in messages[name][1]


def test_buffers_may_be_dropped_in_any_order(gpu_rank_pool):
    gpu_rank_pool(2).run(run_on_gpu, cp_errors.check_buffers_may_be_dropped_in_any_order, "device")


def test_auto_takes_the_device_backend_where_all_ranks_reach_each_other(gpu_rank_pool):
    for shown, _ in gpu_rank_pool(4).run(run_on_gpu, cp_device.choose, "device", "auto"):
        assert ", device, " in shown


def test_ranks_of_several_nodes_take_the_collective_backend(gpu_rank_pool):
    ranks = gpu_rank_pool(4, 2)
    for shown, _ in ranks.run(run_on_gpu, cp_device.choose, "device", "auto"):
        assert ", collective, " in shown
    for _, error in ranks.run(run_on_gpu, cp_device.choose, "device", "device"):
        assert "needs all ranks in one LSA team (got teams of 2 of 4 ranks" in error
