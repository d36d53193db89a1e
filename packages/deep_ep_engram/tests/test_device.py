"""The device backend on ranks that share a GPU or have one each, and on make-believe nodes."""

from __future__ import annotations

import engram_device
import engram_device_failures
import engram_setting
import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

# Ranks and nodes. One class of tests for each, so that its ranks start once.
SHAPES = {"1_rank": (1, 1), "2_ranks": (2, 1), "4_ranks": (4, 1), "8_ranks": (8, 1), "2_nodes_of_2": (4, 2)}


@pytest.fixture(scope="module", params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.fixture(params=engram_setting.MEMORIES)
def memory(request):
    return request.param


@pytest.fixture
def ranks(gpu_rank_pool, shape):
    return gpu_rank_pool(*shape)


@pytest.mark.parametrize("name", engram_device.SHARED_CASES)
def test_what_holds_for_all_backends(ranks, memory, name):
    ranks.run(engram_setting.run_case, name, memory, *engram_device.SHARED_CASES[name], timeout_s=240)


def test_rows_of_any_size_are_right(ranks, memory):
    ranks.run(engram_device.check_row_sizes, memory, timeout_s=240)


def test_many_rows_are_right(ranks, memory):
    ranks.run(engram_device.check_many_rows, memory, timeout_s=240)


def test_a_fetch_needs_no_peer(ranks, memory):
    ranks.run(engram_device.check_fetch_needs_no_peer, memory)


def test_streams_are_ordered(ranks, memory):
    ranks.run(engram_device.check_streams, memory)


def test_the_host_waits_for_nothing(ranks, memory):
    ranks.run(engram_device.check_host_does_not_wait, memory)


def test_a_table_from_the_cpu_stays_on_the_cpu(ranks, memory):
    ranks.run(engram_device.check_cpu_table, memory)


def test_a_graph_fetches_anew_at_each_replay(ranks, memory, shape):
    if shape[1] == 1 or memory == "host":
        assert ranks.run(engram_device.check_graph, memory) == [15] * shape[0]
        return
    for said in ranks.run(engram_device.check_capture_is_refused_where_entries_cross_the_network, memory):
        assert "a fetch can be captured in a CUDA graph where loads reach all entries" in said


def test_more_fetches_than_the_stage_has_room_for(ranks, memory):
    ranks.run(engram_device.check_full_stage, memory)


def test_which_kernels_run(ranks, memory, shape):
    """One kernel where loads reach all entries; over a network those that ask and wait, and a second copy."""
    crosses = shape[1] > 1 and memory == "device"
    for names in ranks.run(engram_device.kernels_of_a_fetch, memory):
        own = {name: num for name, num in names.items() if name.startswith("engram_")}
        if crosses:
            assert own == {"engram_get_rows_kernel": 1, "engram_wait_rows_kernel": 1, "engram_fetch_kernel": 2}, names
        else:
            assert names == {"engram_fetch_kernel": 1}


def test_wrong_indices_are_told_later_and_harm_nothing(ranks, memory, shape):
    num_entries = 20 * shape[0]
    for rank, told in enumerate(ranks.run(engram_device_failures.fetch_out_of_range, memory)):
        found = {"end: hook": num_entries, "negative: hook": -1, "far: hook": 2**31 - 1}
        for name, message in told.items():
            assert message is not None, name
            assert f"indices must lie in [0, {num_entries}), the entries of all ranks" in message
            assert f"{found.get(name, 2**31 - 1)} at [2, 1] of engram_fetch #" in message
            assert f"on rank {rank}" in message
        assert set(told) == {*found, "next fetch", "close"}


def test_a_wrong_index_of_one_rank_does_not_stop_a_write(ranks, memory, shape):
    *others, told = ranks.run(engram_device_failures.write_after_wrong_index, memory)
    assert others == [None] * (shape[0] - 1)
    num_entries = 20 * shape[0]
    assert f"indices must lie in [0, {num_entries}), the entries of all ranks" in told
    assert f"{num_entries} at [2, 1] of engram_fetch #1" in told


def test_a_write_that_cannot_be_is_refused(ranks, memory):
    for told in ranks.run(engram_device_failures.write_elsewhere, memory):
        assert "engram_write must be called outside of a CUDA graph" in told["captured"]
        assert "storage must be on cuda:77, the device of the table on this rank" in told["another device"]


@pytest.mark.parametrize("num_ranks", [4])
class TestFourRanks:
    """What takes long, or breaks its ranks."""

    def test_1000_random_rounds_equal_a_plain_lookup(self, gpu_rank_pool, num_ranks, memory):
        arguments = "check_random_rounds", memory, 1000
        assert gpu_rank_pool(num_ranks).run(engram_setting.run_case, *arguments, timeout_s=280) == [1000] * num_ranks

    @pytest.mark.parametrize("name", engram_device.SHARED_CASES)
    def test_cuda_tensors_on_the_collective_backend(self, gpu_rank_pool, num_ranks, memory, name):
        gpu_rank_pool(num_ranks).run(
            engram_device.run_case_on_collective, name, memory, *engram_device.SHARED_CASES[name], timeout_s=240
        )

    def test_a_late_rank_within_the_timeout_is_waited_for(self, gpu_rank_pool, num_ranks, memory):
        gpu_rank_pool(num_ranks).run(engram_device_failures.write_late, memory, 1, 30.0, 0.5)

    def test_a_rank_that_is_late_to_a_write_is_named(self, gpu_rank_pool, num_ranks, memory):
        pool = gpu_rank_pool(num_ranks)
        outcomes = pool.run_catching(engram_device_failures.write_late, memory, 1, 2.0, 4.0, timeout_s=60)
        pool.restart()
        for outcome in outcomes:
            assert outcome.error_type_name == "CommTimeoutError", outcome
            assert list(outcome.error_attributes["peers"]) == [1], outcome.error_message
            assert "engram_write" in outcome.error_attributes["phase"]

    def test_a_table_that_is_half_written_is_not_read(self, gpu_rank_pool, num_ranks, memory):
        pool = gpu_rank_pool(num_ranks)
        outcomes = pool.run(engram_device_failures.write_slowly, memory, 1, 2.0, 4.0, timeout_s=60)
        pool.restart()
        for peers, said in outcomes:
            assert list(peers) == [1]
            assert said.startswith("TransportError: EngramTable cannot be used on rank")
            assert "an engram_write that not all ranks have ended" in said

    def test_a_dead_rank_is_named_by_a_write(self, gpu_rank_pool, num_ranks, memory):
        pool = gpu_rank_pool(num_ranks)
        outcomes = pool.run_catching(engram_device_failures.die_before_writing, memory, 2, 6.0, timeout_s=60)
        pool.restart()
        assert outcomes[2].died
        for rank in (0, 1, 3):
            assert outcomes[rank].error_type_name is None, outcomes[rank]
            said, peers = outcomes[rank].value
            assert list(peers) == [2], said
