"""What cannot be is refused in words that help, before anything is sent; ranks that disagree are all told so."""

import legacy_failures
import pytest

from deep_ep_core.errors import ConfigError


@pytest.fixture(scope="module")
def told(rank_pool):
    """What each of two ranks was told, by rank and name of the bad call."""
    return rank_pool(2).run(legacy_failures.collect_rejections)


@pytest.mark.parametrize("name", list(legacy_failures.REJECTIONS))
def test_bad_call_is_refused_on_every_rank_in_words_that_help(told, name):
    for rank, messages in enumerate(told):
        assert messages[name] is not None, f"rank {rank} accepted it"
        for word in legacy_failures.REJECTIONS[name][1]:
            assert word in messages[name], messages[name]


@pytest.mark.parametrize("name", list(legacy_failures.CONSTRUCTOR_REJECTIONS))
def test_bad_setting_is_refused_without_a_process_group(name):
    call, words = legacy_failures.CONSTRUCTOR_REJECTIONS[name]
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ("operation", "combine"),
        ("hidden", "128"),
        ("dtype of x", "float16"),
        ("number of scales", "3"),
        ("use of a handle", "True"),
        ("dtype of topk_idx", "int32"),
        ("number of columns of topk_weights", "0"),
        ("num_nvl_bytes", "256"),
        ("low_latency_mode", "True"),
    ],
)
def test_ranks_that_disagree_are_all_told_who_passed_what(rank_pool, change, shown):
    for outcome in rank_pool(2).run_catching(legacy_failures.disagree, 1, change):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert f"must call Buffer with the same {change} " in outcome.error_message
        assert outcome.error_attributes["values"][1] == shown


def test_handles_of_different_dispatches_do_not_meet(rank_pool):
    for outcome in rank_pool(2).run_catching(legacy_failures.mix_handles, 1):
        assert outcome.error_type_name == "ConfigError", outcome
        assert "handle must be of the same dispatch on every rank: by this one the rows" in outcome.error_message


def test_a_rank_that_refuses_is_named_with_its_reason(rank_pool):
    pool = rank_pool(2)
    outcomes = pool.run_catching(legacy_failures.refuse, 1, 2.0, timeout_s=60)
    pool.restart()
    assert outcomes[1].error_type_name == "ConfigError"
    assert outcomes[0].error_type_name == "CommTimeoutError"
    assert "rank 1 refused: expert_alignment must be an integer >= 1" in outcomes[0].error_message
