"""Bad low-latency calls are refused before anything is sent, in words that help; a failure names its rank."""

import legacy_low_latency_errors as errors
import pytest


@pytest.fixture(scope="module")
def told(rank_pool):
    """What each of two ranks was told, by rank and name of the bad call."""
    return rank_pool(2).run(errors.collect_rejections)


@pytest.mark.parametrize("name", list(errors.REJECTIONS))
def test_bad_call_is_refused_on_every_rank_in_words_that_help(told, name):
    for rank, messages in enumerate(told):
        assert name in messages, f"rank {rank} accepted it"
        error_type_name, message = messages[name]
        assert error_type_name == "ConfigError"
        for word in (*errors.REJECTIONS[name][1], f"on rank {rank}"):
            assert word in message, message


@pytest.mark.parametrize("enable_shrink", [False, True])
@pytest.mark.parametrize(
    ("changes", "field", "shown"),
    [
        ({"num_max_dispatch_tokens_per_rank": 16}, "num_max_dispatch_tokens_per_rank", "16"),
        ({"num_experts": 16}, "num_experts", "16"),
        ({"hidden": 512}, "hidden", "512"),
        ({"use_fp8": False}, "use_fp8", "False"),
        ({"round_scale": False}, "round_scale", "False"),
        ({"use_ue8m0": True}, "use_ue8m0", "True"),
        ({"clean": True}, "operation", "clean_low_latency_buffer"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_ranks_that_disagree_are_all_told_who_passed_what(rank_pool, changes, field, shown, enable_shrink):
    for outcome in rank_pool(2).run_catching(errors.disagree, 1, changes, enable_shrink):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert f"the same {field} " in outcome.error_message
        assert f"rank 1: {shown}" in outcome.error_message
        assert outcome.error_attributes["field"] == field
        assert outcome.error_attributes["values"][1] == shown


def test_ranks_that_disagree_about_a_combine_are_all_told(rank_pool):
    for outcome in rank_pool(2).run_catching(errors.disagree_in_combine):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert outcome.error_attributes["field"] == "use_logfmt"


def test_late_rank_is_named(rank_pool):
    pool = rank_pool(2)
    outcomes = pool.run_catching(errors.stay_away)
    pool.restart()
    assert outcomes[0].error_type_name == "CommTimeoutError", outcomes[0]
    assert outcomes[0].error_attributes["peers"] == (1,)
    assert "rank 1" in outcomes[0].error_message


def test_peers_learn_why_a_rank_refused(rank_pool):
    pool = rank_pool(2)
    outcomes = pool.run_catching(errors.refuse)
    pool.restart()
    assert outcomes[1].error_type_name == "ConfigError"
    assert outcomes[0].error_type_name == "CommTimeoutError"
    assert "refused: topk_idx must hold experts in [0, 8)" in outcomes[0].error_message


def test_rank_that_dies_with_rows_under_way_is_named_and_ends_the_session(rank_pool):
    pool = rank_pool(2)
    outcomes = pool.run_catching(errors.die_before_rows)
    assert outcomes[1].died
    assert "every rank must send its " in outcomes[0].value
    assert "but rank 1 did not in low_latency_dispatch" in outcomes[0].value
    assert "TransportError: Buffer cannot make low-latency calls on rank 0 after a failed one" in outcomes[0].value


def test_peers_learn_of_a_failure_that_only_one_rank_saw(rank_pool):
    pool = rank_pool(2)
    outcomes = pool.run_catching(errors.fail_alone)
    # One rank has another `PendingMessages` now.
    pool.restart()
    assert outcomes[1].error_type_name == outcomes[0].error_type_name == "CommTimeoutError"
    assert "rank 1 refused: every rank must send its rows" in outcomes[0].error_message
    assert "the cable was pulled" in outcomes[0].error_message
