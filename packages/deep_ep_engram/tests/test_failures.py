"""What cannot be is refused in words that help, before anything is sent; a rank that keeps others waiting is named."""

import engram_failures
import pytest

EXPECTED_WORDS = {
    name: words for name, (_, words) in {**engram_failures.REJECTIONS, **engram_failures.CONSTRUCTOR_REJECTIONS}.items()
}


@pytest.fixture(scope="module")
def told(rank_pool):
    """What each of two ranks was told, by rank and name of the bad call."""
    return rank_pool(2).run(engram_failures.collect_rejections)


@pytest.mark.parametrize("name", list(EXPECTED_WORDS))
def test_bad_call_is_refused_on_every_rank_in_words_that_help(told, name):
    for rank, messages in enumerate(told):
        message = messages[name]
        assert message is not None, f"rank {rank} accepted it"
        for word in EXPECTED_WORDS[name]:
            assert word in message, message
        if name in engram_failures.REJECTIONS:
            assert f"on rank {rank}" in message


@pytest.mark.parametrize(
    ("change", "field", "shown"),
    [
        ("num_bytes", "num_bytes", "4194304"),
        ("num_cpu_bytes", "num_cpu_bytes", "2097152"),
        ("backend", "backend", "collective"),
        ("hidden", "hidden size of storage", "32"),
        ("dtype", "dtype of storage", "bfloat16"),
        ("rows", "number of rows of sf", "7"),
        ("packs", "number of packs of sf", "1"),
        ("sf_dtype", "dtype of sf", "int32"),
        ("operation", "operation", "engram_fetch"),
    ],
)
def test_ranks_that_disagree_are_all_told_who_passed_what(rank_pool, change, field, shown):
    for outcome in rank_pool(4).run_catching(engram_failures.disagree, 2, change):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert f"must call EngramTable with the same {field} " in outcome.error_message
        assert f"rank 2: {shown}" in outcome.error_message
        assert outcome.error_attributes["values"][2] == shown


@pytest.mark.parametrize("backend", ["auto", "collective"])
def test_log_says_why_a_table_has_the_collective_backend(rank_pool, backend):
    for name, said in rank_pool(2).run(engram_failures.chosen_backend, backend):
        assert name == "collective"
        assert len(said) == 1
        assert said[0].startswith("EngramTable uses the collective backend: ")


def test_a_late_rank_within_the_timeout_is_waited_for(rank_pool):
    rank_pool(4).run(engram_failures.come_late, 1, 30.0, 0.5)


def test_a_late_rank_is_named_to_all_and_to_itself(rank_pool):
    pool = rank_pool(4)
    outcomes = pool.run_catching(engram_failures.come_late, 1, 2.0, 4.0, timeout_s=60)
    pool.restart()
    for rank, outcome in enumerate(outcomes):
        assert outcome.error_type_name == "CommTimeoutError", outcome
        assert list(outcome.error_attributes["peers"]) == [1], (rank, outcome.error_message)
        assert "engram_fetch" in outcome.error_attributes["phase"]
    assert "this rank" in outcomes[1].error_message


def test_a_rank_that_dies_before_it_sends_entries_is_named(rank_pool):
    pool = rank_pool(4)
    outcomes = pool.run_catching(engram_failures.die_before_sending, 2, 6.0, timeout_s=60)
    assert outcomes[2].died
    for rank in (0, 1, 3):
        assert outcomes[rank].error_type_name is None, outcomes[rank]
        first, peers, second = outcomes[rank].value
        assert list(peers) == [2], first
        assert "rank 2 did not in EngramTable: engram_fetch #3: entries" in first
        assert second.startswith(f"TransportError: EngramTable cannot be used on rank {rank}")
        assert "make a new process group and a new table" in second


def test_a_rank_that_refuses_its_indices_is_named_with_its_reason(rank_pool):
    pool = rank_pool(2)
    outcomes = pool.run_catching(engram_failures.refuse, 1, 2.0, timeout_s=60)
    pool.restart()
    assert outcomes[1].error_type_name == "ConfigError"
    assert outcomes[0].error_type_name == "CommTimeoutError"
    assert list(outcomes[0].error_attributes["peers"]) == [1]
    assert "rank 1 refused: indices must lie in [0, 40)" in outcomes[0].error_message
