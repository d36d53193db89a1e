"""The normal calls of the device backend, on ranks that share one GPU or have one each: to the bit what the collective
backend gives.

One class for each number of ranks, so that the ranks of a number start once.
"""

from __future__ import annotations

import legacy_device_normal as program
import legacy_frameworks_sglang
import legacy_frameworks_tensorrt_llm
import legacy_frameworks_training
import legacy_frameworks_vllm
import pytest

pytestmark = pytest.mark.gpu

FRAMEWORK_CALLS = {
    "vLLM, high throughput": legacy_frameworks_vllm.call_high_throughput,
    "vLLM, low latency": legacy_frameworks_vllm.call_low_latency,
    "SGLang, normal and low latency": legacy_frameworks_sglang.call_normal_and_low_latency,
    "Megatron-Core, V1": legacy_frameworks_training.call_megatron_v1,
    "TensorRT-LLM, normal": legacy_frameworks_tensorrt_llm.call_normal,
    "TensorRT-LLM, low latency": legacy_frameworks_tensorrt_llm.call_low_latency,
}


class AnyNumberOfRanks:
    """What holds for any number of ranks."""

    num_ranks: int

    @pytest.fixture
    def ranks(self, gpu_rank_pool):
        return gpu_rank_pool(self.num_ranks)

    def test_every_result_is_that_of_the_collective_backend(self, ranks):
        """Exact and worst-case sizes, cached, without top-k, with scales, weights and biases; handles too."""
        assert ranks.run(program.check_cases, timeout_s=120) == [len(program.CASES)] * self.num_ranks

    def test_stage_of_a_few_tokens_gives_the_same_results(self, ranks):
        """What does not fit the window goes in rounds."""
        ranks.run(program.check_rounds, timeout_s=120)


class TestTwoRanks(AnyNumberOfRanks):
    num_ranks = 2

    def test_calls_run_beside_the_current_stream(self, ranks):
        ranks.run(program.check_streams)

    def test_dropped_buffer_is_free(self, ranks):
        ranks.run(program.check_dropped_buffer)

    def test_tensors_on_the_cpu_are_taken_too(self, ranks):
        ranks.run(program.check_cpu_tensors)


class TestFourRanks(AnyNumberOfRanks):
    num_ranks = 4

    def test_random_calls_give_the_same_results(self, ranks):
        num_done = set(ranks.run(program.check_random_rounds, 200, 60, timeout_s=120))
        assert len(num_done) == 1
        assert num_done.pop() > 0

    def test_graph_replays_with_other_inputs(self, ranks):
        ranks.run(program.check_graph)

    def test_wrong_arguments_are_named_and_do_no_harm(self, ranks):
        ranks.run(program.check_wrong_arguments)

    def test_late_rank_is_named(self, ranks):
        ranks.run(program.check_late_peer)

    @pytest.mark.parametrize("name", list(FRAMEWORK_CALLS))
    def test_calls_of_a_framework_give_what_torch_gives(self, ranks, name):
        ranks.run(program.call_framework, FRAMEWORK_CALLS[name])


class TestEightRanks(AnyNumberOfRanks):
    num_ranks = 8


def test_ranks_of_several_nodes_have_no_kernels(gpu_rank_pool):
    gpu_rank_pool(2, num_nodes=2).run(program.check_several_nodes)
