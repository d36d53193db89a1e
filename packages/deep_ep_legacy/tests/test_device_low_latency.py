"""The low-latency calls on the device backend against the collective one; one class for each number of ranks."""

from __future__ import annotations

import legacy_device_latency_failures as failures
import legacy_device_low_latency as latency
import pytest

pytestmark = pytest.mark.gpu


class AnyNumberOfRanks:
    """What holds for any number of ranks."""

    num_ranks: int

    @pytest.fixture
    def ranks(self, gpu_rank_pool):
        return gpu_rank_pool(self.num_ranks)

    def test_every_format_and_way_of_finishing_is_right(self, ranks):
        assert ranks.run(latency.check_modes, timeout_s=120) == [12] * self.num_ranks

    def test_rows_of_any_length_and_routing_are_right(self, ranks):
        ranks.run(latency.check_shapes, timeout_s=120)

    def test_logfmt_stays_within_its_bound(self, ranks):
        ranks.run(latency.check_logfmt, timeout_s=120)

    def test_statistics_are_added(self, ranks):
        ranks.run(latency.check_stats)

    def test_hooks_may_come_in_any_order_or_never(self, ranks):
        ranks.run(latency.check_hooks_in_any_order)

    def test_a_graph_of_an_odd_number_of_calls_is_right_at_each_replay(self, ranks):
        assert ranks.run(latency.check_graphs, timeout_s=120) == [20] * self.num_ranks

    def test_two_hundred_random_rounds_are_right(self, ranks):
        assert ranks.run(latency.check_random_rounds, timeout_s=280) == [200] * self.num_ranks

    def test_masked_rank_is_left_out(self, ranks):
        ranks.run(failures.check_masked_rank_is_left_out)

    def test_late_rank_is_masked_after_one_timeout(self, ranks):
        ranks.run(failures.check_late_rank_is_masked)

    def test_rank_that_came_late_is_taken_back(self, ranks):
        ranks.run(failures.check_masked_rank_is_taken_back)

    def test_late_rank_is_named_where_there_is_no_mask(self, ranks):
        ranks.run(failures.check_late_rank_is_named)

    def test_wrong_experts_are_told_to_their_rank(self, ranks):
        ranks.run(failures.check_wrong_experts_are_told)

    def test_other_sizes_or_flags_are_told(self, ranks):
        ranks.run(failures.check_disagreement_is_told)

    def test_what_kernels_do_not_take_is_refused(self, ranks):
        ranks.run(failures.check_refusals)


class TestTwoRanks(AnyNumberOfRanks):
    num_ranks = 2


class TestFourRanks(AnyNumberOfRanks):
    num_ranks = 4


class TestEightRanks(AnyNumberOfRanks):
    num_ranks = 8
