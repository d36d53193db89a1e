"""Entries in host memory are seen by every rank of a machine; where they cannot be, all ranks are told why."""

from __future__ import annotations

import engram_host_memory
import torch


def test_each_rank_reads_what_the_others_fill_in(rank_pool):
    for calls in rank_pool(4).run(engram_host_memory.check_shared):
        assert calls[:8] == ["cuMemHostRegister", "cuMemHostGetDevicePointer"] * 4
        assert calls[8:] == ["synchronize", *["wait for cpu", "cuMemHostUnregister"] * 4]


def test_pages_that_are_dropped_go_once_the_device_is_done():
    """A kernel may still read them."""
    calls = engram_host_memory.drop_a_mapped_segment(torch.device("cuda", 3))
    assert calls[2:] == ["wait for cuda:3", "cuMemHostUnregister"]


def test_ranks_of_other_machines_are_named(rank_pool):
    for outcome in rank_pool(4).run_catching(engram_host_memory.open_from_another_machine, 2):
        assert outcome.error_type_name == "TopologyError", outcome
        assert "got others for ranks 2" in outcome.error_message
        assert "num_cpu_bytes=0" in outcome.error_message


def test_a_file_that_is_another_ones_is_not_taken(rank_pool):
    outcomes = rank_pool(2).run_catching(engram_host_memory.find_another_file, 1)
    assert [outcome.error_type_name for outcome in outcomes] == ["TransportError"] * 2
    assert "but found another file" in outcomes[1].error_message
    assert "got a failure on rank 1" in outcomes[0].error_message


def test_a_file_that_cannot_be_opened_is_told_to_all(rank_pool):
    outcomes = rank_pool(2).run_catching(engram_host_memory.open_without_permission, 0)
    assert [outcome.error_type_name for outcome in outcomes] == ["TransportError"] * 2
    assert "rank 0 must be able to open the shared memory of rank 0" in outcomes[0].error_message
    assert "one container, or a shared PID namespace" in outcomes[0].error_message


def test_a_lack_of_memory_is_told_to_all(rank_pool):
    outcomes = rank_pool(2).run_catching(engram_host_memory.run_short_of_memory, 1)
    assert [outcome.error_type_name for outcome in outcomes] == ["TransportError"] * 2
    assert "the host must have 2097152 bytes of shared memory" in outcomes[1].error_message
    assert "got a failure on rank 1" in outcomes[0].error_message


def test_what_was_mapped_is_given_back_where_the_rest_cannot_be(rank_pool):
    first, second = rank_pool(2).run(engram_host_memory.refuse_to_map, 1)
    assert second[0] == "cuMemHostRegister failed: CUDA_ERROR_OUT_OF_MEMORY"
    assert second.count("cuMemHostUnregister") == 1
    # The one that could is closed too.
    assert "got a failure on rank 1" in first[0]
    assert first.count("cuMemHostUnregister") == 2
