"""What must be refused is refused before anything is sent, in words that help."""

import ep_errors
import ep_failures
import pytest

EXPECTED_WORDS = {
    name: words for name, (_, words) in {**ep_errors.REJECTIONS, **ep_errors.CONSTRUCTOR_REJECTIONS}.items()
}


@pytest.fixture(scope="module")
def told(rank_pool):
    """What each of two ranks was told, by rank and name of the bad call."""
    return rank_pool(2).run(ep_errors.collect_rejections)


@pytest.mark.parametrize("name", list(EXPECTED_WORDS))
def test_bad_call_is_refused_on_every_rank_in_words_that_help(told, name):
    for rank, messages in enumerate(told):
        assert name in messages, f"rank {rank} accepted it"
        _, message = messages[name]
        for word in EXPECTED_WORDS[name]:
            assert word in message, message
        if name in ep_errors.REJECTIONS:
            assert f"on rank {rank}" in message


@pytest.mark.parametrize(
    ("changes", "field", "shown"),
    [
        ({"num_experts": 32}, "num_experts", "32"),
        ({"num_max_tokens_per_rank": 24}, "num_max_tokens_per_rank", "24"),
        ({"hidden": True}, "hidden size of x", "512"),
        ({"dtype": True}, "dtype of x", "float32"),
        ({"expert_alignment": 4}, "expert_alignment", "4"),
        ({"num_topk": True}, "num_topk", "2"),
        ({"do_expand": True}, "do_expand", "True"),
        ({"sf": True}, "number of scale packs", "2"),
        ({"topk_weights": True}, "dtype of topk_weights", "float32"),
        ({"combine": True}, "operation", "barrier"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_ranks_that_disagree_are_all_told_who_passed_what(rank_pool, changes, field, shown):
    outcomes = rank_pool(4).run_catching(ep_failures.disagree, 2, changes)
    for outcome in outcomes:
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert f"the same {field} " in outcome.error_message
        assert f"rank 2: {shown}" in outcome.error_message
        assert outcome.error_attributes["field"] == field
        assert outcome.error_attributes["values"][2] == shown


@pytest.mark.parametrize(
    "changes", [{"num_max_tokens_per_rank": 64}, {"allow_hybrid_mode": False}, {"num_bytes": 32 << 20}], ids=str
)
def test_ranks_that_make_different_buffers_are_all_told(rank_pool, changes):
    (field,) = changes
    for outcome in rank_pool(4).run_catching(ep_failures.disagree_in_constructor, 1, changes):
        assert outcome.error_type_name == "RankMismatchError"
        assert f"the same {field} " in outcome.error_message


def test_ranks_that_combine_with_different_handles_are_all_told(rank_pool):
    for outcome in rank_pool(4).run_catching(ep_failures.disagree_in_combine):
        assert outcome.error_type_name == "RankMismatchError"
        assert "rank 2: that of dispatch number 1" in outcome.error_message
        assert "rank 3: that of dispatch number 2" in outcome.error_message


def test_a_buffer_works_on_after_a_disagreement(rank_pool):
    assert all(num_rows > 0 for num_rows in rank_pool(4).run(ep_failures.agree_after_disagreement))


@pytest.mark.parametrize("victim", [0, 2])
def test_killing_a_rank_in_the_middle_of_a_dispatch_names_it_to_the_others(rank_pool, victim):
    pool = rank_pool(4)
    outcomes = pool.run_catching(ep_failures.die_in_the_middle, victim, 8.0, timeout_s=60)
    pool.restart()
    assert outcomes[victim].died
    for rank in set(range(4)) - {victim}:
        assert outcomes[rank].error_type_name == "CommTimeoutError", outcomes[rank]
        assert list(outcomes[rank].error_attributes["peers"]) == [victim]
        assert f"rank {victim} did not" in outcomes[rank].error_message
        assert "dispatch" in outcomes[rank].error_attributes["phase"]


def test_a_late_rank_is_named_to_all_and_to_itself(rank_pool):
    pool = rank_pool(4)
    outcomes = pool.run_catching(ep_failures.come_late, 1, 4.0, 8.0, timeout_s=60)
    pool.restart()
    for rank, outcome in enumerate(outcomes):
        assert outcome.error_type_name == "CommTimeoutError", outcome
        assert list(outcome.error_attributes["peers"]) == [1], (rank, outcome.error_message)
    assert "this rank" in outcomes[1].error_message


def test_a_late_rank_within_the_timeout_is_waited_for(rank_pool):
    rank_pool(4).run(ep_failures.come_late, 1, 30.0, 2.0)


def test_a_rank_that_refuses_its_input_is_named_with_its_reason(rank_pool):
    pool = rank_pool(4)
    outcomes = pool.run_catching(ep_failures.refuse, 3, 4.0, timeout_s=60)
    pool.restart()
    assert outcomes[3].error_type_name == "ConfigError"
    assert "for token 3" in outcomes[3].error_message
    for outcome in outcomes[:3]:
        assert outcome.error_type_name == "CommTimeoutError"
        assert list(outcome.error_attributes["peers"]) == [3]
        assert "rank 3 refused" in outcome.error_message
        assert "below num_experts = 16" in outcome.error_message


def test_a_failed_buffer_says_so_at_once(rank_pool):
    pool = rank_pool(4)
    results = pool.run(ep_failures.use_after_failure, 3.0, timeout_s=60)
    pool.restart()
    for result in (results[0], results[2], results[3]):
        assert result.startswith("TransportError: ElasticBuffer cannot be used")
        assert "make a new process group" in result


def test_buffers_may_be_dropped_in_any_order(rank_pool):
    rank_pool(4).run(ep_failures.drop_without_destroy)
