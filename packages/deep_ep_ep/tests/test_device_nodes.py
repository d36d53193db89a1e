"""The device backend across nodes: make-believe nodes on GPUs that ranks share, over the loopback network.

One class for each shape, so that the ranks of a shape start once. The checks are those of one node (`test_device`), in
hybrid and in direct mode; what a faulty network does to them runs in ranks of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ep_device
import ep_device_failures
import ep_device_graphs
import ep_device_random
import ep_device_shapes
import ep_device_streams
import ep_device_window
import ep_nodes
import pytest

pytestmark = pytest.mark.gpu

PROGRAM = Path(ep_nodes.__file__)


class AnyShape:
    """What holds for any number of ranks and nodes."""

    num_ranks: int
    num_nodes: int

    @pytest.fixture
    def ranks(self, gpu_rank_pool):
        return gpu_rank_pool(self.num_ranks, self.num_nodes)

    @pytest.fixture(params=ep_nodes.MODES)
    def mode(self, request):
        return request.param

    def test_auto_takes_the_collective_backend(self, ranks):
        ranks.run(ep_nodes.check_the_choice)

    # Against the reference

    def test_modes_match_the_reference(self, ranks, mode):
        """Every eighth of the modes: shapes and modes of the network differ too."""
        counts = ranks.run(
            ep_nodes.run_in_mode, mode, ep_device.run_check, "check_all_modes", "auto", 3, 8, timeout_s=240
        )
        assert counts == [18] * self.num_ranks

    def test_partial_sums_of_nodes_match_the_reference(self, ranks):
        """With and without the hierarchy, with and without partial sums."""
        ranks.run(ep_nodes.check_topologies, timeout_s=240)

    def test_any_number_of_tokens_matches_the_reference(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device.run_check, "check_sizes", "auto", timeout_s=240)

    def test_any_payload_and_scale_layout_moves_unchanged(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device.run_check, "check_payloads", "torch", timeout_s=240)

    def test_several_handles_can_be_alive(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device.run_check, "check_interleaved", "window")

    def test_rows_and_metadata_may_be_permuted_together(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device.run_check, "check_permuted_rows", "auto")

    def test_any_number_of_tiles_is_planned_right(self, ranks, mode):
        counts = ranks.run(ep_nodes.run_in_mode, mode, ep_device_shapes.check_tiles, "auto", timeout_s=240)
        assert counts == [15] * self.num_ranks

    def test_long_rows_many_entries_and_many_experts_are_right(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_shapes.check_wide_shapes, "auto", timeout_s=240)

    def test_calls_that_kernels_do_not_take_go_to_the_collective_backend(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_shapes.check_calls_of_the_collective_backend, "auto")

    # Memory

    @pytest.mark.parametrize("memory", ["auto", "window"])
    def test_outputs_are_read_where_they_lie(self, ranks, mode, memory):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_window.check_combine_in_place, memory)

    def test_two_dispatches_may_stand_before_two_combines(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_window.check_two_of_each, "auto")

    def test_buffers_close_in_any_order(self, ranks, mode):
        """At once after the last call, when the network may still read what a rank has sent."""
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_window.check_buffers_close_in_any_order, "auto")

    # Graphs and streams

    def test_a_graph_is_right_at_each_replay_with_other_routing(self, ranks, mode):
        counts = ranks.run(ep_nodes.run_in_mode, mode, ep_device_graphs.check_graphs, "auto", timeout_s=240)
        assert counts == [20] * self.num_ranks

    def test_calls_are_ordered_with_their_stream(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_streams.check_streams, "auto")

    def test_no_stream_passes_a_barrier_before_a_slow_rank(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_streams.check_barrier, "auto")

    def test_barriers_keep_out_of_the_way_of_operations(self, ranks, mode):
        ranks.run(ep_nodes.run_in_mode, mode, ep_device_streams.check_barriers_beside_operations, "auto")

    def test_random_calls_are_right_whatever_came_before(self, ranks, mode):
        counts = ranks.run(ep_nodes.run_in_mode, mode, ep_device_random.check_random_calls, "auto", 60, timeout_s=240)
        assert counts == [60] * self.num_ranks

    # Failures

    def test_ranks_that_disagree_are_all_told_and_the_buffer_works_on(self, ranks, mode):
        for told in ranks.run(ep_nodes.run_in_mode, mode, ep_device_failures.disagree, "auto", timeout_s=240):
            for name, error in told.items():
                assert error is not None, name
                assert error["type"] == "RankMismatchError", (name, error)
                assert error["values"][-1] != error["values"][0], (name, error)
            assert told["num_experts, True"]["field"] == "num_experts"
            assert told["combine: operation"]["field"] == "operation"

    def test_an_expert_that_does_not_exist_is_named_to_all_and_the_buffer_works_on(self, ranks, mode):
        for told in ranks.run(ep_nodes.run_in_mode, mode, ep_device_failures.route_to_nowhere, "auto"):
            assert len(told) == 8
            for name, error in told.items():
                assert error is not None, name
                assert error["type"] == "ConfigError", (name, error)
                token = 7 if ", 33, " in name else 1029
                assert f"for token {token} of rank {self.num_ranks - 1}," in error["text"], (name, error)

    def test_a_buffer_works_on_however_far_hosts_were_ahead_of_a_failure(self, ranks, mode):
        for told in ranks.run(ep_nodes.run_in_mode, mode, ep_device_failures.fail_with_hosts_ahead, "auto"):
            assert [error and error["type"] for error in told] == ["ConfigError"] * 4, told

    def test_what_fails_on_one_rank_is_told_to_all_and_the_buffer_works_on(self, ranks, mode):
        *others, last = ranks.run(ep_nodes.run_in_mode, mode, ep_device_failures.fail_on_one_rank, "window")
        assert [error and error["type"] for error in last] == ["HeapFullError"] * 2, last
        for told in others:
            for error in told:
                assert error is not None
                assert (error["type"], error["field"]) == ("RankMismatchError", "operation"), error
                assert error["values"][-1] == "refusal", error

    @pytest.mark.parametrize("late_rank", ["first", "last"])
    def test_a_rank_that_does_not_come_is_named_on_every_other(self, ranks, mode, late_rank):
        """On its own node and on others, whether or not its slot would have come through another rank."""
        late = 0 if late_rank == "first" else self.num_ranks - 1
        for rank, told in enumerate(ranks.run(ep_nodes.run_in_mode, mode, ep_device_failures.stay_away, "auto", late)):
            names = set() if rank == late else {"dispatch", "dispatch again", "barrier", "combine"}
            assert told.keys() == names
            for name, error in told.items():
                assert error is not None, name
                assert error["type"] == "CommTimeoutError", (name, error)
                assert list(error["peers"]) == [late], (rank, name, error)

    # What only a network of its own shows

    def run_program(self, *checks: str, **environ: str) -> None:
        """`ep_nodes` in fresh ranks with these variables, in both modes."""
        command = [sys.executable, "-m", "deep_ep_core.launch", "--device", "cuda", "--timeout", "120"]
        command += ["--ranks", str(self.num_ranks), "--nodes", str(self.num_nodes), str(PROGRAM), "--memory", "auto"]
        done = subprocess.run(
            [*command, *checks], env={**os.environ, **environ}, capture_output=True, text=True, timeout=180, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for check in checks:
            for mode in ep_nodes.MODES:
                assert f"right: {mode} {check}" in done.stdout

    def test_one_row_crosses_the_network_for_a_token_and_a_node(self, tmp_path):
        """Or for a token and a rank, in direct mode: what the network counted is what the formula says."""
        self.run_program("check_traffic", EP_LOOPBACK_COUNTERS=str(tmp_path))

    @pytest.mark.parametrize(
        "faults",
        [{"EP_LOOPBACK_DELAY_US": "500"}, {"EP_LOOPBACK_REORDER": "1", "EP_LOOPBACK_DELAY_US": "200"}],
        ids=["late", "in any order"],
    )
    def test_messages_may_be_late_and_overtake_each_other(self, faults):
        self.run_program("check_interleaved", "check_200_random_calls", **faults)


class TestTwoNodesOfTwo(AnyShape):
    num_ranks, num_nodes = 4, 2


class TestFourNodesOfOne(AnyShape):
    num_ranks, num_nodes = 4, 4


class TestTwoNodesOfFour(AnyShape):
    num_ranks, num_nodes = 8, 2


class TestFourNodesOfTwo(AnyShape):
    num_ranks, num_nodes = 8, 4


class TestEightNodesOfOne(AnyShape):
    num_ranks, num_nodes = 8, 8
