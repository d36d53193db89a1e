"""What must be refused is refused before anything is sent, in words that help; and who is late is named."""

from __future__ import annotations

import cp_errors
import pytest

EXPECTED_WORDS = {
    name: words for name, (_, words) in {**cp_errors.REJECTIONS, **cp_errors.CONSTRUCTOR_REJECTIONS}.items()
}


@pytest.fixture(scope="module")
def told(rank_pool):
    """What each of two ranks was told, by rank and name of the bad call."""
    return rank_pool(2).run(cp_errors.collect_rejections)


@pytest.mark.parametrize("name", list(EXPECTED_WORDS))
def test_bad_call_is_refused_on_every_rank_in_words_that_help(told, name):
    for rank, messages in enumerate(told):
        assert name in messages, f"rank {rank} accepted it"
        _, message = messages[name]
        for word in EXPECTED_WORDS[name]:
            assert word in message, message
        if name in cp_errors.REJECTIONS:
            assert f"on rank {rank}" in message


@pytest.mark.parametrize(
    ("name", "field", "shown"),
    [
        ("configuration", "num_max_session_bytes", "2048"),
        ("calls", "num_max_all_gathers_per_session", "5"),
        ("session", "session", "number 2 of this buffer"),
        ("operation", "operation", "reduce_scatter"),
        ("elements", "number of elements of tensor 0", "15"),
        ("dtype", "dtype of tensor 0", "int32"),
        ("shape", "list of shapes", None),
        ("sum", "number of elements of tensor 0", "5"),
        ("length of the batch", "number of tensors", "3"),
        ("seventh tensor", "list of shapes", None),
    ],
)
def test_ranks_that_disagree_are_all_told_who_passed_what(rank_pool, name, field, shown):
    outcomes = rank_pool(2).run_catching(cp_errors.disagree, 1, name)
    for rank, outcome in enumerate(outcomes):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert f"must call ContextBuffer with the same {field} " in outcome.error_message
        assert outcome.error_attributes["field"] == field
        if shown is not None:
            assert outcome.error_attributes["values"][1] == shown
        else:
            # Each rank reads its own shapes.
            assert outcome.error_attributes["values"][1 - rank] == "others"
            assert "float32" in outcome.error_attributes["values"][rank]


def test_ranks_that_make_different_buffers_are_all_told(rank_pool):
    for outcome in rank_pool(2).run_catching(cp_errors.disagree_in_constructor, 1):
        assert outcome.error_type_name == "RankMismatchError"
        assert "the same num_bytes " in outcome.error_message


def test_a_buffer_works_on_after_a_disagreement(rank_pool):
    rank_pool(2).run(cp_errors.check_a_buffer_works_on_after_a_disagreement)


def test_buffers_may_be_dropped_in_any_order(rank_pool):
    rank_pool(2).run(cp_errors.check_buffers_may_be_dropped_in_any_order)


def test_a_late_rank_within_the_timeout_is_waited_for(rank_pool):
    assert rank_pool(2).run(cp_errors.come_late, 1, 30.0, 1.0) == ["in time"] * 2


def test_a_rank_that_refuses_its_input_is_named_with_its_reason(rank_pool):
    outcomes = rank_pool(2).run_catching(cp_errors.refuse, 1, 3.0, timeout_s=60)
    assert outcomes[1].error_type_name == "ConfigError"
    assert outcomes[0].error_type_name == "CommTimeoutError"
    assert list(outcomes[0].error_attributes["peers"]) == [1]
    assert "rank 1 refused" in outcomes[0].error_message
    assert "dense and contiguous" in outcomes[0].error_message


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_late_rank_is_named_to_all_and_to_itself(rank_pool, num_ranks):
    results = rank_pool(num_ranks).run(cp_errors.come_late, 1, 2.0, 4.5, timeout_s=60)
    for result in results:
        assert result.startswith("(1,) every rank must take part in reduce_scatter"), result
    assert "rank 1 (this rank) was late" in results[1]
