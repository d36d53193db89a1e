"""Row exchanges, agreement and failures, over gloo on the CPU unless a test is marked gpu."""

from __future__ import annotations

import itertools

import core_agreement
import core_exchanges
import core_failures
import pytest
import torch
import torch.distributed as dist

from deep_ep_core.errors import ConfigError, RankFailedError
from deep_ep_core.transport import AgreedField, CollectiveTransport

# Exchanges


@pytest.mark.parametrize("counts", [core_exchanges.UNEVEN, core_exchanges.OWN_ONLY, core_exchanges.NONE])
def test_rows_arrive_ordered_by_source_rank(rank_pool, counts):
    rank_pool(4).run(core_exchanges.check_move, counts, (5,), torch.int64)


@pytest.mark.parametrize(
    ("row_shape", "dtype"),
    [
        ((16,), torch.float8_e4m3fn),
        ((7,), torch.float8_e5m2),
        ((3,), torch.float8_e8m0fnu),
        ((4,), torch.float4_e2m1fn_x2),
        ((5,), torch.bool),
        ((1,), torch.int16),
        ((9,), torch.uint16),
        ((3,), torch.bfloat16),
        ((3,), torch.complex64),
        ((), torch.int32),
        ((), torch.float8_e4m3fn),
        ((2, 3), torch.bfloat16),
        ((2, 1, 3), torch.bool),
        ((0,), torch.float32),
        ((70_001,), torch.uint8),
    ],
    ids=lambda value: str(value).replace("torch.", ""),
)
def test_rows_of_any_dtype_and_shape_arrive_to_the_bit(rank_pool, row_shape, dtype):
    rank_pool(4).run(core_exchanges.check_move, core_exchanges.UNEVEN, row_shape, dtype)


def test_rows_are_received_into_a_larger_tensor(rank_pool):
    rank_pool(4).run(core_exchanges.check_move_into_larger_tensor)


def test_several_tensors_travel_in_one_exchange(rank_pool):
    rank_pool(4).run(core_exchanges.check_several_tensors)


def test_an_operation_may_have_several_exchanges(rank_pool):
    rank_pool(4).run(core_exchanges.check_several_exchanges_of_an_operation)


def test_an_exchange_of_nothing_waits_for_nobody(rank_pool):
    rank_pool(4).run(core_exchanges.check_exchange_of_nothing_waits_for_nobody)


def test_own_rows_that_do_not_match_are_a_bug_that_shows(rank_pool):
    for outcome in rank_pool(4).run_catching(core_exchanges.mistake_own_rows):
        assert outcome.error_type_name == "AssertionError"


def test_each_peer_gets_its_own_values(rank_pool):
    rank_pool(4).run(core_exchanges.check_peer_values)


def test_two_transports_of_one_group_do_not_mix(rank_pool):
    rank_pool(4).run(core_exchanges.check_two_transports_on_one_group)


@pytest.mark.parametrize("members", [[1, 3], [0, 2, 3]], ids=str)
def test_ranks_of_a_subgroup_are_counted_in_the_subgroup(rank_pool, members):
    rank_pool(4).run(core_exchanges.check_subgroup, members)


def test_a_group_of_one_needs_nobody(rank_pool):
    rank_pool(4).run(core_exchanges.check_groups_of_one)


def test_no_group_means_the_default_group(rank_pool):
    rank_pool(4).run(core_exchanges.check_default_group)


def test_a_process_without_torch_distributed_is_told_what_to_call():
    assert not dist.is_initialized()
    with pytest.raises(ConfigError, match=r"Thing needs an initialised process group.*init_process_group.*single rank"):
        CollectiveTransport(None, timeout_s=1.0, name="Thing", operations=[])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "nccl"])
def test_rows_of_a_gpu_arrive_over_nccl(rank_pool, gpu_ranks, backend):
    rank_pool(gpu_ranks).run(core_exchanges.check_move_on_gpu, backend)


@pytest.mark.gpu
def test_rows_of_a_gpu_arrive_through_the_host(rank_pool):
    """With gloo two ranks may share a GPU."""
    rank_pool(2).run(core_exchanges.check_move_on_gpu, "gloo")


# Agreement


@pytest.mark.parametrize(
    ("odd_call", "field", "odd_value", "value"),
    [
        ("value", "width", "-512", "256"),
        ("shown value", "mode", "fast", "slow"),
        ("dtype", "dtype of x", "float8_e4m3fn", "bfloat16"),
        ("no dtype", "dtype of x", "none", "bfloat16"),
        ("operation", "operation", "turn", "move"),
        ("fewer arguments", "number of arguments", "2", "3"),
        ("skipped operation", "number of operations so far", "3", "2"),
        ("version", "protocol version", "2", "1"),
        # The first difference is named, in the order of the fields.
        ("two values", "width", "1", "256"),
    ],
)
def test_ranks_that_disagree_are_all_told_who_passed_what(rank_pool, odd_call, field, odd_value, value):
    odd_rank = 2
    for rank, outcome in enumerate(rank_pool(4).run_catching(core_agreement.disagree, odd_rank, odd_call)):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert outcome.error_attributes["field"] == field
        assert outcome.error_attributes["values"] == (value, value, odd_value, value)
        got = f"(got rank 0: {value}, rank 1: {value}, rank 2: {odd_value}, rank 3: {value}; seen in "
        assert f"must call the test with the same {field} {got}" in outcome.error_message
        assert f"#2 on rank {rank})" in outcome.error_message or "#3 on rank 2)" in outcome.error_message
        assert "nothing was sent" in outcome.error_message


def test_an_operation_that_others_do_not_know_is_shown_by_its_code(rank_pool):
    """Another version of a package may have more operations."""
    for outcome in rank_pool(4).run_catching(core_agreement.disagree, 2, "unknown operation"):
        assert outcome.error_attributes["field"] == "operation"
        assert "rank 1: move, rank 2: an operation of code " in outcome.error_message


def test_calls_of_two_transports_in_different_orders_are_told_apart(rank_pool):
    """Without it the rows of one would arrive in the other."""
    for outcome in rank_pool(4).run_catching(core_agreement.take_turns_in_another_order, 1):
        assert outcome.error_type_name == "RankMismatchError", outcome
        assert outcome.error_attributes["field"] == "instance"
        values = outcome.error_attributes["values"]
        assert values[0] == values[2] == values[3] != values[1]


def test_a_transport_works_on_after_disagreements(rank_pool):
    told = rank_pool(4).run(core_agreement.agree_after_disagreements)
    assert len(told[0]) == 2
    assert all(messages == told[0] for messages in told)


def test_as_many_and_as_large_values_as_are_allowed_are_agreed_on(rank_pool):
    rank_pool(4).run(core_agreement.agree_on_all_that_fits)


def test_the_last_field_is_compared_and_peer_values_are_not_taken_for_it(rank_pool):
    for outcome in rank_pool(4).run_catching(core_agreement.disagree_on_last_field, 3):
        assert outcome.error_attributes["field"] == "field 23"
        assert outcome.error_attributes["values"] == ("23", "23", "23", str(2**63 - 1))


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_a_value_that_the_message_cannot_hold_is_refused_by_its_name(value):
    """Before anything is counted or sent, so that the peers do not wait for a rank that broke off."""
    with pytest.raises(ConfigError, match=f"num_bytes must fit into 64 bits.*got {value}"):
        AgreedField(name="num_bytes", value=value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu, torch.bool, torch.uint64, torch.half])
def test_a_dtype_is_shown_by_its_name(dtype):
    field = AgreedField.of_dtype("dtype of x", dtype)
    assert f"torch.{field.show(field.value)}" == str(dtype)


def test_dtypes_are_told_apart():
    dtypes = {dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
    values = {AgreedField.of_dtype("x", dtype).value for dtype in dtypes}
    assert len(values - {0}) == len(dtypes) > 20
    assert AgreedField.of_dtype("x", None).show(0) == "none"
    assert AgreedField.of_dtype("x", None).show(7) == "a dtype of code 7"


# Failures

TIMEOUT_S = 4.0


@pytest.fixture(scope="module")
def told_of_a_late_rank(rank_pool):
    """What each rank was told when rank 1 came late, and what the next call said."""
    return rank_pool(4).run(core_failures.come_after_the_others_gave_up, 1, TIMEOUT_S)


def test_a_late_rank_is_named_to_those_who_waited(told_of_a_late_rank):
    for rank in (0, 2, 3):
        told, _ = told_of_a_late_rank[rank]
        assert told["peers"] == [1]
        assert told["rank"] == rank
        assert told["phase"] == "move #2: arguments"
        others = {0, 2, 3} - {rank}
        assert set(told["reports"]) == others
        assert all(text.startswith("in move #2: arguments") for text in told["reports"].values())
        for words in ("within 4 s", "but rank 1 did not", f"(seen on rank {rank} of 4)", "rank 1 says nothing"):
            assert words in told["message"]


def test_a_late_rank_learns_that_it_was_late(told_of_a_late_rank):
    """Although the others refused another call meanwhile: what they reported on the failure stands."""
    told, _ = told_of_a_late_rank[1]
    assert told["peers"] == [1]
    assert set(told["reports"]) == {0, 2, 3}
    assert "rank 1 (this rank) was late" in told["message"]


def test_a_transport_that_failed_says_so_at_once(told_of_a_late_rank):
    for rank, (told, following) in enumerate(told_of_a_late_rank):
        assert following.startswith(f"TransportError: the test cannot be used on rank {rank} after a failed operation")
        assert told["message"] in following
        assert following.endswith("make a new process group and a new buffer")


def test_the_wait_and_the_roll_call_share_the_timeout(told_of_a_late_rank):
    """Three quarters of it are waited for a peer. The rest of this bound is for a slow machine."""
    for rank in (0, 2, 3):
        assert 0.75 * TIMEOUT_S * 0.99 <= told_of_a_late_rank[rank][0]["elapsed_s"] < 4 * TIMEOUT_S


@pytest.mark.parametrize("refusing", [[3], [0, 2]], ids=str)
def test_ranks_that_refuse_are_named_with_their_reasons(rank_pool, refusing):
    for rank, told in enumerate(rank_pool(4).run(core_failures.refuse, refusing, TIMEOUT_S)):
        if rank in refusing:
            assert told is None
            continue
        assert told["peers"] == refusing
        for other in refusing:
            assert told["reports"][other] == f"refused: x of rank {other} is bad"
            assert f"rank {other} refused: x of rank {other} is bad" in told["message"]


def test_a_refusal_that_was_made_good_is_not_blamed_later(rank_pool):
    """The ranks refused the first attempt at the very operation that fails later for another reason."""
    told = rank_pool(4).run(core_failures.stay_away_after_refusals, 2, [0, 1, 3], TIMEOUT_S)
    assert told[2] is None
    for rank in (0, 1, 3):
        assert told[rank]["peers"] == [2], told[rank]["message"]
        assert told[rank]["phase"] == "move #1: payload"
        assert "refused" not in told[rank]["message"]


@pytest.mark.parametrize("is_silent", [False, True], ids=["no store", "silent store"])
def test_where_the_store_cannot_be_asked_the_peer_that_was_waited_for_is_named(rank_pool, is_silent):
    told = rank_pool(4).run(core_failures.fail_without_a_store, 2, TIMEOUT_S, is_silent)
    for rank in (0, 1, 3):
        assert told[rank]["peers"] == [2]
        assert told[rank]["reports"] == {}
        assert "the group's store does not answer" in told[rank]["message"]
        assert told[rank]["elapsed_s"] < 4 * TIMEOUT_S


def test_the_exchanges_of_an_operation_share_one_deadline(rank_pool):
    for waits in rank_pool(4).run(core_failures.record_waits, 8.0, 0.3):
        assert [len(exchange) for exchange in waits] == [6, 6, 6]
        assert max(waits[0]) <= 8.0 * 0.75
        for earlier, later in itertools.pairwise(waits):
            assert max(later) <= min(earlier) - 0.3


def test_no_more_than_three_seconds_are_kept_for_the_roll_call(rank_pool):
    for waits in rank_pool(4).run(core_failures.record_waits, 100.0, 0.0):
        assert 90.0 < max(waits[0]) <= 97.0


def test_a_deadline_that_has_passed_is_not_taken_for_none(rank_pool):
    """A wait of zero would be without end for the backend."""
    for waits in rank_pool(4).run(core_failures.record_waits, 0.01, 0.1):
        assert set(waits[1] + waits[2]) == {0.001}


def test_a_killed_rank_is_named_to_the_others(rank_pool):
    """Long before the timeout: its connections break."""
    pool = rank_pool(4)
    outcomes = pool.run_catching(core_failures.die, 2, 20.0, timeout_s=100)
    with pytest.raises(RankFailedError):
        pool.run(dist.get_rank)
    pool.restart()
    assert outcomes[2].died
    for rank in (0, 1, 3):
        told = outcomes[rank].value
        assert told["peers"] == [2], told
        assert told["phase"] == "move #1: payload"
        assert "rank 2 says nothing: it died" in told["message"]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_timeout_that_no_backend_can_count_is_refused(timeout_s):
    with pytest.raises(ConfigError, match=r"the timeout of Buffer must be positive and at most 31536000 s \(got .*\)"):
        CollectiveTransport(None, timeout_s=timeout_s, name="Buffer", operations=["open"])
