"""What is sent arrives, to the bit, in order, within the window; over gloo on the CPU."""

import pp_messages
import pytest


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_messages_of_any_size_arrive_between_any_two_ranks(rank_pool, num_ranks):
    rank_pool(num_ranks).run(pp_messages.check_sizes)


def test_every_dtype_arrives_to_the_bit(rank_pool):
    rank_pool(2).run(pp_messages.check_dtypes)


def test_several_tensors_are_one_message_whose_shapes_are_the_receivers_choice(rank_pool):
    rank_pool(2).run(pp_messages.check_multi_tensor_messages)


def test_a_tensor_that_needs_a_gradient_is_sent_and_received_into(rank_pool):
    rank_pool(2).run(pp_messages.check_tensor_with_gradient_is_sent_and_received_into)


@pytest.mark.parametrize(("window", "num_messages"), [(1, 5), (2, 7), (3, 10)])
def test_the_window_wraps(rank_pool, window, num_messages):
    rank_pool(2).run(pp_messages.check_window_wraps, window, num_messages)


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
@pytest.mark.parametrize("window", [1, 3])
def test_a_sender_ahead_of_the_window_waits_and_proceeds(rank_pool, window, size):
    rank_pool(2).run(pp_messages.check_sender_ahead_of_the_window_waits, window, size)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_both_directions_at_once_do_not_wait_for_each_other(rank_pool, num_ranks):
    rank_pool(num_ranks).run(pp_messages.check_bidirectional, 2)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_random_interleavings_arrive_to_the_bit(rank_pool, num_ranks):
    sent = rank_pool(num_ranks).run(pp_messages.check_random_rounds, 1000 * num_ranks, 200, 10)
    assert sum(sent) >= 200 * 8


def test_the_functions_do_what_the_methods_do(rank_pool):
    rank_pool(4).run(pp_messages.check_functions)


def test_two_buffers_of_one_group_do_not_mix(rank_pool):
    rank_pool(2).run(pp_messages.check_two_buffers_of_one_group)


@pytest.mark.parametrize("members", [[1, 3], [0, 2, 3]], ids=str)
def test_ranks_of_a_subgroup_are_counted_in_the_subgroup(rank_pool, members):
    rank_pool(4).run(pp_messages.check_subgroup, members)


def test_a_group_without_a_host_backend_is_given_one(rank_pool):
    rank_pool(4).run(pp_messages.check_group_without_a_host_backend)


def test_a_reconfiguration_between_messages_takes_effect(rank_pool):
    rank_pool(4).run(pp_messages.check_reconfiguration)


def test_closing_hands_over_what_was_sent(rank_pool):
    rank_pool(2).run(pp_messages.check_close_hands_over_what_was_sent)
