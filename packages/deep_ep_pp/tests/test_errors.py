"""What must be refused is refused before anything is sent, late and dead ranks are named, and nothing hangs."""

import pp_errors
import pp_failures
import pytest

EXPECTED_WORDS = {
    name: words for name, (_, words) in {**pp_errors.REJECTIONS, **pp_errors.CONSTRUCTOR_REJECTIONS}.items()
}


@pytest.fixture(scope="module")
def told(rank_pool):
    """What each of four ranks was told, by rank and name of the bad call."""
    return rank_pool(4).run(pp_errors.collect_rejections)


@pytest.mark.parametrize("name", list(EXPECTED_WORDS))
def test_bad_call_is_refused_on_every_rank_in_words_that_help(told, name):
    for rank, messages in enumerate(told):
        assert name in messages, f"rank {rank} accepted it"
        for word in EXPECTED_WORDS[name]:
            assert word in messages[name]
        if name in pp_errors.REJECTIONS and name != "too many bits":
            assert f"on rank {rank}" in messages[name]


@pytest.mark.parametrize(
    ("odd", "field", "shown"),
    [((64, 3), "num_max_tensor_bytes", "64"), ((128, 2), "num_max_inflight_tensors", "2")],
    ids=str,
)
def test_ranks_that_configure_differently_are_all_told_and_keep_what_they_had(rank_pool, odd, field, shown):
    for told in rank_pool(4).run(pp_failures.disagree_in_configuration, 2, odd):
        assert told["field"] == field
        assert told["values"][2] == shown
        assert f"PipelineBuffer with the same {field} " in told["message"]
        assert f"rank 2: {shown}" in told["message"]


def test_configuring_with_a_message_on_its_way_is_refused_on_all_ranks(rank_pool):
    for rank, message in enumerate(rank_pool(4).run(pp_failures.reconfigure_with_a_message_on_its_way)):
        assert "got 1 sent by rank 3 to rank 1, which received 0" in message
        assert f"seen on rank {rank}" in message


@pytest.mark.parametrize(
    ("odd", "field"), [({"num_bytes": 2 << 20}, "num_bytes"), ({"backend": "device"}, "backend")], ids=str
)
def test_ranks_that_make_different_buffers_are_all_told(rank_pool, odd, field):
    for outcome in rank_pool(4).run_catching(pp_failures.disagree_in_constructor, 1, odd):
        assert outcome.error_type_name == "RankMismatchError"
        assert outcome.error_attributes["field"] == field


def test_a_message_of_other_sizes_is_refused_and_can_still_be_received(rank_pool):
    told = rank_pool(2).run(pp_failures.receive_other_sizes)[1]
    assert len(told) == 5
    for message in told:
        assert "pp_recv #1 from rank 0 must be given tensors of the message's sizes, [9, 0] bytes" in message
    assert "got [8, 0], on rank 1" in told[-1]


def test_a_refused_call_leaves_everything_as_it_was(rank_pool):
    rank_pool(2).run(pp_failures.go_on_after_a_refusal)


def test_a_late_rank_at_the_end_of_a_chain_is_named_to_all_who_wait(rank_pool):
    told = rank_pool(4).run(pp_failures.wait_for_a_late_rank, 6.0)
    for rank in (1, 2, 3):
        assert told[rank]["peers"] == [0], told[rank]["message"]
        assert told[rank]["phase"] == f"pp_recv #1 from rank {rank - 1}"
        assert "within 6 s, but rank 0 did not" in told[rank]["message"]
        assert "rank 0 says nothing" in told[rank]["message"]
    assert "rank 2 in pp_recv #1 from rank 1, waiting for rank 1" in told[3]["message"]


def test_a_late_receiver_is_named_to_a_sender_beyond_the_window(rank_pool):
    told = rank_pool(2).run(pp_failures.wait_for_a_late_receiver, 2.0)[0]
    assert told["peers"] == [1]
    assert told["phase"] == "pp_send #2 to rank 1"


def test_a_late_receiver_is_named_to_a_sender_that_closes(rank_pool):
    told = rank_pool(2).run(pp_failures.close_before_anybody_receives, 2.0)[0]
    assert told["peers"] == [1]
    assert "flush of messages to rank 1" in told["phase"]


def test_leaving_a_block_by_an_error_waits_for_nobody(rank_pool):
    assert rank_pool(2).run(pp_failures.leave_a_block_by_an_error, 60.0)[0] < 30


def test_ranks_that_wait_for_each_other_are_told_so(rank_pool):
    for rank, told in enumerate(rank_pool(2).run(pp_failures.wait_for_each_other, 3.0)):
        assert told["peers"] == [1 - rank]
        assert f"rank {1 - rank} in pp_recv #1 from rank {rank}, waiting for rank {rank}" in told["message"]


def test_a_rank_that_refuses_is_named_with_its_reason_to_all_who_wait(rank_pool):
    told = rank_pool(4).run(pp_failures.refuse_to_send, 5.0)
    assert "a message must fit into the 64 bytes" in told[0]
    for rank in (1, 2):
        assert told[rank]["peers"] == [0], told[rank]["message"]
        assert "rank 0 refused: a message must fit into the 64 bytes" in told[rank]["message"]


def test_a_rank_that_refuses_the_configuration_is_named_with_its_reason(rank_pool):
    told = rank_pool(4).run(pp_failures.refuse_configuration, 3.0)
    for rank in (0, 1, 3):
        assert told[rank]["peers"] == [2]
        assert "rank 2 refused: num_max_inflight_tensors must be" in told[rank]["message"]


def test_a_failed_buffer_says_so_at_once_and_can_be_closed(rank_pool):
    told = rank_pool(2).run(pp_failures.use_after_failure, 2.0)[0]
    assert len(told) == 3
    for message in told:
        assert message.startswith("TransportError: PipelineBuffer cannot be used on rank 0 after a failed operation")
        assert "rank 1 did not" in message


def test_a_dead_rank_is_named_to_all_who_wait(rank_pool):
    pool = rank_pool(4)
    outcomes = pool.run_catching(pp_failures.die, 2, 6.0, timeout_s=60)
    pool.restart()
    assert outcomes[2].died
    for rank in (0, 1, 3):
        assert outcomes[rank].value is not None, outcomes[rank]
        assert outcomes[rank].value["peers"] == [2], outcomes[rank].value["message"]
