"""The device backend on ranks that share one GPU or have one each: what `ep_modes` checks, and what only it can do.

One class for each number of ranks, so that the ranks of a number start once.
"""

from __future__ import annotations

import ep_device
import ep_device_failures
import ep_device_graphs
import ep_device_random
import ep_device_shapes
import ep_device_streams
import ep_device_window
import pytest
from ep_device_setting import RECV_MEMORIES

pytestmark = pytest.mark.gpu

# Where received rows live, by the number of ranks. Each memory is there in one number, and each number in one memory:
# they have little to do with each other, and a minute of a GPU is dear.
MEMORIES = {1: ("auto",), 2: ("window",), 4: RECV_MEMORIES, 8: ("auto",)}
# Together they run all modes, each a share of them.
SHARES = [(num_ranks, memory) for num_ranks, memories in MEMORIES.items() for memory in memories]


def pytest_generate_tests(metafunc):
    if "memory" in metafunc.fixturenames:
        metafunc.parametrize("memory", MEMORIES[metafunc.cls.num_ranks])


class AnyNumberOfRanks:
    """What holds for any number of ranks."""

    num_ranks: int

    @pytest.fixture
    def ranks(self, gpu_rank_pool):
        return gpu_rank_pool(self.num_ranks)

    # Against the reference

    def test_modes_match_the_reference(self, ranks, memory):
        share = SHARES.index((self.num_ranks, memory))
        counts = ranks.run(ep_device.run_check, "check_all_modes", memory, share, len(SHARES), timeout_s=240)
        assert counts == [144 // len(SHARES)] * self.num_ranks

    def test_any_number_of_tokens_matches_the_reference(self, ranks, memory):
        """0, 1, 31, 32, 33, uneven, all to one rank, none; with exact and with worst-case sizes."""
        ranks.run(ep_device.run_check, "check_sizes", memory, timeout_s=240)

    def test_any_payload_and_scale_layout_moves_unchanged(self, ranks, memory):
        ranks.run(ep_device.run_check, "check_payloads", memory, timeout_s=240)

    def test_one_to_all_experts_a_token_match_the_reference(self, ranks, memory):
        ranks.run(ep_device.run_check, "check_topk", memory, timeout_s=240)

    def test_several_handles_can_be_alive(self, ranks, memory):
        ranks.run(ep_device.run_check, "check_interleaved", memory)

    def test_rows_and_metadata_may_be_permuted_together(self, ranks, memory):
        ranks.run(ep_device.run_check, "check_permuted_rows", memory)

    def test_a_hundred_dispatches_give_one_hash(self, ranks, memory):
        ranks.run(ep_device.run_check, "check_repeated", memory)

    def test_a_single_rounding_matches_the_reference(self, ranks, memory):
        assert ranks.run(ep_device_shapes.check_reductions, memory) == [6] * self.num_ranks

    # Shapes

    def test_any_number_of_tiles_is_planned_right(self, ranks, memory):
        """511 to 4096 tokens a rank, on 1, 3 and 16 SMs."""
        assert ranks.run(ep_device_shapes.check_tiles, memory, timeout_s=240) == [15] * self.num_ranks

    def test_long_rows_many_entries_and_many_experts_are_right(self, ranks, memory):
        ranks.run(ep_device_shapes.check_wide_shapes, memory, timeout_s=240)

    def test_rows_that_the_receiver_spreads_are_right(self, ranks, memory):
        """As between GPUs: a row crosses a link once for all experts of a rank."""
        ranks.run(ep_device_shapes.check_fan_out_at_receiver, memory, timeout_s=240)

    def test_calls_that_kernels_do_not_take_go_to_the_collective_backend(self, ranks):
        ranks.run(ep_device_shapes.check_calls_of_the_collective_backend, "auto")

    # Memory

    def test_outputs_are_read_where_they_lie(self, ranks, memory):
        assert ranks.run(ep_device_window.check_combine_in_place, memory) == [24] * self.num_ranks

    def test_rows_that_are_read_and_rows_that_are_pushed_mix(self, ranks, memory):
        ranks.run(ep_device_window.check_pulled_and_pushed_rows_mix, memory)

    def test_two_dispatches_may_stand_before_two_combines(self, ranks, memory):
        ranks.run(ep_device_window.check_two_of_each, memory)

    def test_outputs_that_the_window_has_no_room_for_are_right(self, ranks):
        ranks.run(ep_device_window.check_full_heap, "auto")

    def test_outputs_outlive_their_buffer(self, ranks, memory):
        ranks.run(ep_device_window.check_outputs_outlive_their_buffer, memory)

    def test_buffers_close_in_any_order(self, ranks, memory):
        ranks.run(ep_device_window.check_buffers_close_in_any_order, memory)

    # Graphs and streams

    def test_a_graph_is_right_at_each_replay_with_other_routing(self, ranks, memory):
        assert ranks.run(ep_device_graphs.check_graphs, memory) == [20] * self.num_ranks

    def test_results_of_a_graph_outlive_its_buffer(self, ranks, memory):
        ranks.run(ep_device_graphs.check_graph_outlives_its_buffer, memory)

    def test_calls_are_ordered_with_their_stream(self, ranks, memory):
        ranks.run(ep_device_streams.check_streams, memory)

    def test_calls_wait_for_their_previous_events(self, ranks, memory):
        ranks.run(ep_device_streams.check_previous_event, memory)

    def test_outputs_that_a_third_stream_used_last_are_not_overwritten(self, ranks, memory):
        ranks.run(ep_device_streams.check_third_stream, memory)

    def test_no_stream_passes_a_barrier_before_a_slow_rank(self, ranks):
        ranks.run(ep_device_streams.check_barrier, "auto")

    # Random calls

    def test_random_calls_are_right_whatever_came_before(self, ranks, memory):
        num_rounds = 250
        counts = ranks.run(ep_device_random.check_random_calls, memory, num_rounds, timeout_s=240)
        assert counts == [num_rounds] * self.num_ranks

    # Failures

    def test_an_expert_that_does_not_exist_is_named_to_all_and_the_buffer_works_on(self, ranks, memory):
        for told in ranks.run(ep_device_failures.route_to_nowhere, memory):
            assert len(told) == 8
            for name, error in told.items():
                assert error is not None, name
                assert error["type"] == "ConfigError", (name, error)
                token = 7 if ", 33, " in name else 1029
                assert f"for token {token} of rank {self.num_ranks - 1}," in error["text"], (name, error)


class SeveralRanks(AnyNumberOfRanks):
    """What needs more than one."""

    def test_ranks_that_disagree_are_all_told_and_the_buffer_works_on(self, ranks):
        expected = {
            f"{name}, {do_cpu_sync}": (field, shown)
            for name, (_, field, shown) in ep_device_failures.DISAGREEMENTS.items()
            for do_cpu_sync in (True, False)
            if name != "CPU sync"
        }
        expected |= {
            "CPU sync": ("operation", "dispatch"),
            "combine: handle": ("handle", None),
            "combine: hidden": ("hidden size of x", "32"),
            "combine: weights": ("dtype of topk_weights", "none"),
            "combine: operation": ("operation", "dispatch of known counts"),
        }
        for told in ranks.run(ep_device_failures.disagree, "auto"):
            assert told.keys() == expected.keys()
            for name, (field, shown) in expected.items():
                error = told[name]
                assert error is not None, name
                assert error["type"] == "RankMismatchError", (name, error)
                assert error["field"] == field, (name, error)
                assert f"the same {field} (got rank 0: " in error["text"]
                assert shown is None or error["values"][-1] == shown, (name, error)
                assert error["values"][-1] != error["values"][0], (name, error)

    @pytest.mark.parametrize("late_rank", ["first", "last"])
    def test_a_rank_that_does_not_come_is_named_and_cuda_stays_usable(self, ranks, late_rank):
        """After the timeout of the kernels; and buffers that are made anew work."""
        late = 0 if late_rank == "first" else self.num_ranks - 1
        for rank, told in enumerate(ranks.run(ep_device_failures.stay_away, "auto", late)):
            names = set() if rank == late else {"dispatch", "dispatch again", "barrier", "combine"}
            assert told.keys() == names
            for name, error in told.items():
                assert error is not None, name
                assert error["type"] == "CommTimeoutError", (name, error)
                assert list(error["peers"]) == [late], (name, error)
                phase = "barrier" if name == "barrier" else "the opening of the operation"
                assert error["phase"] == phase
                assert f"for rank {late}, which must come" in error["text"]

    def test_a_late_rank_within_the_timeout_is_waited_for(self, ranks):
        ranks.run(ep_device_failures.check_late_rank_is_waited_for, "auto")


class TestOneRank(AnyNumberOfRanks):
    num_ranks = 1


class TestTwoRanks(SeveralRanks):
    num_ranks = 2


class TestFourRanks(SeveralRanks):
    num_ranks = 4


class TestEightRanks(SeveralRanks):
    num_ranks = 8
