"""The call sequences of frameworks run unchanged on `deep_ep`, and give what plain torch gives."""

import legacy_frameworks_sglang
import legacy_frameworks_tensorrt_llm
import legacy_frameworks_training
import legacy_frameworks_vllm
import pytest

CALLS = {
    "vLLM, high throughput": legacy_frameworks_vllm.call_high_throughput,
    "vLLM, low latency": legacy_frameworks_vllm.call_low_latency,
    "vLLM, V2": legacy_frameworks_vllm.call_v2,
    "SGLang, normal and low latency": legacy_frameworks_sglang.call_normal_and_low_latency,
    "SGLang, V2": legacy_frameworks_sglang.call_v2,
    "Megatron-Core, V1": legacy_frameworks_training.call_megatron_v1,
    "Megatron-Core, V2": legacy_frameworks_training.call_megatron_v2,
    "torchtitan": legacy_frameworks_training.call_torchtitan,
    "TensorRT-LLM, normal": legacy_frameworks_tensorrt_llm.call_normal,
    "TensorRT-LLM, low latency": legacy_frameworks_tensorrt_llm.call_low_latency,
}
# These pass what V1 tells of nodes along.
CALLS_BY_NODE = ["vLLM, high throughput", "SGLang, normal and low latency", "Megatron-Core, V1"]


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", list(CALLS))
def test_calls_of_a_framework_give_what_torch_gives(rank_pool, name, num_ranks):
    rank_pool(num_ranks).run(CALLS[name])


@pytest.mark.parametrize("name", CALLS_BY_NODE)
def test_calls_of_a_framework_work_on_two_nodes(rank_pool, name):
    rank_pool(4, num_nodes=2).run(CALLS[name])
