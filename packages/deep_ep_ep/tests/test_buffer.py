"""What `ElasticBuffer` promises apart from its results: signatures, attributes, sizes, lifetime, ways to be called."""

from __future__ import annotations

import inspect
import math
from typing import Any

import ep_unit_buffer
import ep_unit_calls
import ep_unit_frameworks
import pytest

from deep_ep_ep import ElasticBuffer, get_logical_domain_size, get_physical_domain_size

MIB = 1 << 20
REQUIRED = inspect.Parameter.empty

# Names, order and defaults as DeepEP V2 has them.
SIGNATURES: dict[str, dict[str, Any]] = {
    "__init__": {
        "group": REQUIRED,
        "num_bytes": None,
        "num_cpu_bytes": 0,
        "num_max_tokens_per_rank": 0,
        "hidden": 0,
        "num_topk": 0,
        "use_fp8_dispatch": False,
        "deterministic": False,
        "allow_hybrid_mode": True,
        "allow_multiple_reduction": True,
        "prefer_overlap_with_compute": True,
        "sl_idx": 3,
        "num_allocated_qps": 0,
        "num_cpu_timeout_secs": 300,
        "num_gpu_timeout_secs": 100,
        "explicitly_destroy": False,
    },
    "destroy": {},
    "get_buffer_size_hint": {
        "group": REQUIRED,
        "num_max_tokens_per_rank": REQUIRED,
        "hidden": REQUIRED,
        "num_topk": 0,
        "use_fp8_dispatch": False,
        "allow_hybrid_mode": True,
        "allow_multiple_reduction": True,
    },
    "barrier": {"use_comm_stream": True, "with_cpu_sync": False, "sequential": True},
    "capture": {},
    "get_comm_stream": {},
    "get_physical_domain_size": {},
    "get_logical_domain_size": {},
    "get_theoretical_num_sms": {
        "num_experts": REQUIRED,
        "num_topk": REQUIRED,
        "num_scaleout_topk": 0,
        "rdma_gbs": 0,
        "nvlink_gbs": 0,
        "sm_read_gbs": 200,
        "sm_write_gbs": 50,
    },
    "get_theoretical_num_qps": {"num_sms": REQUIRED},
    "dispatch": {
        "x": REQUIRED,
        "topk_idx": None,
        "topk_weights": None,
        "cumulative_local_expert_recv_stats": None,
        "num_experts": None,
        "num_max_tokens_per_rank": None,
        "expert_alignment": None,
        "num_sms": 0,
        "num_qps": 0,
        "previous_event": None,
        "previous_event_before_epilogue": None,
        "async_with_compute_stream": False,
        "allocate_on_comm_stream": False,
        "handle": None,
        "do_handle_copy": True,
        "do_cpu_sync": None,
        "do_expand": False,
        "do_zero_padding": False,
        "use_tma_aligned_col_major_sf": False,
    },
    "combine": {
        "x": REQUIRED,
        "handle": REQUIRED,
        "topk_weights": None,
        "bias": None,
        "num_sms": 0,
        "num_qps": 0,
        "previous_event": None,
        "previous_event_before_epilogue": None,
        "async_with_compute_stream": False,
        "allocate_on_comm_stream": False,
    },
}


def positional_parameters(function: Any) -> dict[str, Any]:
    """Names and defaults of what may be passed by position, in order, without `self`."""
    parameters = inspect.signature(function).parameters.values()
    return {
        each.name: each.default
        for each in parameters
        if each.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD and each.name != "self"
    }


@pytest.mark.parametrize("name", list(SIGNATURES))
def test_signature_is_that_of_deepep_v2(name):
    got = positional_parameters(getattr(ElasticBuffer, name))
    assert list(got.items()) == list(SIGNATURES[name].items())


def test_the_arguments_of_our_own_are_two():
    """And they must be named, so that a later argument of upstream's cannot land on them."""
    for name in SIGNATURES:
        parameters = inspect.signature(getattr(ElasticBuffer, name)).parameters.values()
        own = [each.name for each in parameters if each.kind == inspect.Parameter.KEYWORD_ONLY]
        assert own == (["backend", "recv_memory"] if name == "__init__" else [])


def test_domain_functions_have_upstream_signatures():
    assert positional_parameters(get_physical_domain_size) == {"group": REQUIRED}
    logical = positional_parameters(get_logical_domain_size)
    assert list(logical.items()) == [("group", REQUIRED), ("allow_hybrid_mode", True)]


def test_capture_and_the_size_hint_need_no_buffer():
    for name in ("capture", "get_buffer_size_hint"):
        assert isinstance(inspect.getattr_static(ElasticBuffer, name), staticmethod)


# Two ranks


def test_worked_example_token_major(rank_pool):
    """Rank 0's token 0 goes to experts 0 and 1 here and 3 there, token 1 to 2 and 3 there, token 2 to none."""
    sender, receiver = (told["token-major"] for told in rank_pool(2).run(ep_unit_calls.worked_example))
    assert sender == {
        "rows": [10],
        "topk_idx": [[0, -1, 1]],
        "weights": [[0.1, 0.2, 0.3]],
        "num_recv_tokens": 1,
        "num_expanded_tokens": 8,
        "list": [4, 4],
        "unaligned": [1, 1],
        "stats": [1, 1],
        "psum rank": [1, 1],
        "psum expert": [4, 8],
        # Source token 0; the last local entry stands at k = 2.
        "metadata": [[0, 2, -1, -1, -1]],
        "slots": [[-1, 0, 0], [-1, -1, 1], [-1, -1, -1]],
        # (1 + 2^24) - 2^24: rank 1 comes before rank 0. Then 1 + 5, and the bias alone.
        "combined": [0, 6, 1],
        "combined weights": [[1, 20, 3], [40, 0, 60], [0, 0, 0]],
    }
    assert receiver == {
        "rows": [10, 11],
        "topk_idx": [[-1, 1, -1], [0, -1, 1]],
        "weights": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]],
        "num_recv_tokens": 2,
        "num_expanded_tokens": 8,
        "list": [4, 4],
        "unaligned": [1, 2],
        "stats": [1, 2],
        "psum rank": [2, 2],
        "psum expert": [4, 8],
        "metadata": [[0, 1, -1, -1, -1], [1, 2, -1, -1, -1]],
        "slots": [],
        "combined": [],
        "combined weights": [],
    }


def test_worked_example_expert_major(rank_pool):
    """Aligned to 4: expert 0's row is row 0, expert 1's rows start at row 4; the rest is padding, zeroed."""
    sender, receiver = (told["expert-major"] for told in rank_pool(2).run(ep_unit_calls.worked_example))
    assert sender == {
        "rows": [10, 0, 0, 0, 10, 0, 0, 0],
        "topk_idx": None,
        "weights": [[0.1], [0], [0], [0], [0.3], [0], [0], [0]],
        "num_recv_tokens": 1,
        "num_expanded_tokens": 8,
        "list": [4, 4],
        "unaligned": [1, 1],
        "stats": [1, 1],
        "psum rank": [1, 1],
        "psum expert": [1, 5],
        "metadata": [[0, 2, 0, -1, 4]],
        "slots": [[-1, 0, 0], [-1, -1, 1], [-1, -1, -1]],
        # Rank 1 first: 2^24 + (1 - 2^24), the latter made on rank 0. Then 7 + 8, and nothing.
        "combined": [1, 15, 0],
        "combined weights": [[100, 204, 104], [200, 0, 205], [0, 0, 0]],
    }
    assert receiver == {
        "rows": [11, 0, 0, 0, 10, 11, 0, 0],
        "topk_idx": None,
        "weights": [[0.4], [0], [0], [0], [0.2], [0.6], [0], [0]],
        "num_recv_tokens": 2,
        "num_expanded_tokens": 8,
        "list": [4, 4],
        "unaligned": [1, 2],
        "stats": [1, 2],
        "psum rank": [2, 2],
        "psum expert": [1, 6],
        "metadata": [[0, 1, -1, 4, -1], [1, 2, 0, -1, 5]],
        "slots": [],
        "combined": [],
        "combined weights": [],
    }


@pytest.mark.parametrize(
    "call",
    [
        ep_unit_frameworks.call_as_vllm,
        ep_unit_frameworks.call_as_sglang,
        ep_unit_frameworks.call_as_torchtitan,
        ep_unit_frameworks.call_as_megatron,
        ep_unit_frameworks.call_with_everything_by_position,
    ],
    ids=lambda call: call.__name__,
)
def test_framework_calls_run_as_they_are_written(rank_pool, call):
    rank_pool(2).run(call)


def test_repr_tells_the_state(rank_pool):
    for rank, texts in enumerate(rank_pool(2).run(ep_unit_buffer.states_in_repr)):
        is_open, *closed = texts
        assert is_open == f"ElasticBuffer(rank {rank} of 2, collective, num_bytes=2097152, domains=1x2)"
        assert closed == [is_open.replace("collective", "closed")] * 3


def test_a_block_closes_its_buffer_when_it_raises(rank_pool):
    rank_pool(2).run(ep_unit_buffer.close_when_the_block_raises)


def test_environment_overrides_the_service_level(rank_pool):
    """Zero is a level too, not the absence of one."""
    assert rank_pool(2).run(ep_unit_buffer.service_levels) == [(3, 5, 0, 0)] * 2


def test_debug_output_comes_once_and_from_rank_0(rank_pool):
    (made, used), other = rank_pool(2).run(ep_unit_buffer.debug_output)
    assert len(made) == 1
    assert made[0].startswith("ElasticBuffer(rank 0 of 2, collective, num_bytes=67108864, domains=1x2)")
    assert "(R, V) = (1, 2)" in made[0]
    # One estimate for each shape of routing, whatever the number of calls.
    assert len(used) == 2
    assert "SMs for 8 experts, top-1" in used[0]
    assert "SMs for 8 experts, top-2" in used[1]
    assert other == ([], [])


def test_sm_count_flows_into_the_handle_and_stays(rank_pool):
    for counts in rank_pool(2).run(ep_unit_calls.sm_counts):
        assert counts["default"] == counts["model"]
        assert counts["asked"] == 6
        assert counts["no overlap"] >= 64
        assert counts["more entries than experts"] == counts["model of all experts"]


def test_published_sm_count_of_two_ranks(rank_pool):
    """256 experts, top-8, 430.3 GB/s of NVLink: 22 SMs, or 64 where nothing needs the others."""
    call = {"num_experts": 256, "num_topk": 8, "nvlink_gbs": 430.3, "rdma_gbs": 50}
    assert rank_pool(2).run(ep_unit_buffer.estimates, {}, [call], []) == [([22], [])] * 2
    no_overlap = {"prefer_overlap_with_compute": False}
    assert rank_pool(2).run(ep_unit_buffer.estimates, no_overlap, [call], []) == [([64], [])] * 2


def test_no_graph_is_built_in_any_mode(rank_pool):
    rank_pool(2).run(ep_unit_calls.check_no_graph_is_built)


def test_events_of_asynchronous_calls(rank_pool):
    rank_pool(2).run(ep_unit_calls.check_events)


def test_several_buffers_of_one_group(rank_pool):
    rank_pool(2).run(ep_unit_calls.check_several_buffers_of_one_group)


def test_results_are_right_under_torchs_deterministic_algorithms(rank_pool):
    rank_pool(2).run(ep_unit_calls.check_torch_deterministic_mode)


# Four ranks, in one domain and in two


def expected_attributes(rank: int, domains: dict[str, int], **changes: Any) -> dict[str, Any]:
    return {
        "rank_idx": rank,
        "num_ranks": 4,
        "allow_hybrid_mode": True,
        "allow_multiple_reduction": True,
        "prefer_overlap_with_compute": True,
        "deterministic": False,
        "nccl_comm_handle": None,
        "num_bytes": 64 * MIB,
        "num_max_tokens_per_rank": 0,
        "num_allocated_qps": 129,
        "explicitly_destroy": False,
        "num_scaleout_ranks": domains["S"],
        "num_scaleup_ranks": domains["U"],
        "scaleout_rank_idx": rank // domains["U"],
        "scaleup_rank_idx": rank % domains["U"],
        "num_rdma_ranks": domains["R"],
        "num_nvlink_ranks": domains["V"],
        "sl_idx": 3,
        "physical": (domains["R"], domains["V"]),
        "logical": (domains["S"], domains["U"]),
        "physical of the group": (domains["R"], domains["V"]),
        "logical of the group": (domains["R"], domains["V"]),
        "logical of the group, direct": (1, 4),
        **changes,
    }


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"allow_hybrid_mode": False}, {"allow_hybrid_mode": False, "num_allocated_qps": 17}),
        (
            # Numbers do for booleans.
            {
                "num_max_tokens_per_rank": 48,
                "deterministic": 1,
                "allow_multiple_reduction": 0,
                "prefer_overlap_with_compute": 0,
                "explicitly_destroy": 1,
                "num_allocated_qps": 5,
                "num_bytes": 2 * MIB,
                "sl_idx": 1,
            },
            {
                "num_max_tokens_per_rank": 48,
                "deterministic": True,
                "allow_multiple_reduction": False,
                "prefer_overlap_with_compute": False,
                "explicitly_destroy": True,
                "num_allocated_qps": 5,
                "num_bytes": 2 * MIB,
                "sl_idx": 1,
            },
        ),
    ],
    ids=["defaults", "direct", "all set"],
)
@pytest.mark.parametrize("num_nodes", [1, 2])
def test_attributes_of_a_buffer(rank_pool, num_nodes, options, changes):
    physical = {"R": num_nodes, "V": 4 // num_nodes}
    is_direct = options.get("allow_hybrid_mode") is False
    logical = {"S": 1, "U": 4} if is_direct else {"S": physical["R"], "U": physical["V"]}
    for rank, told in enumerate(rank_pool(4, num_nodes=num_nodes).run(ep_unit_buffer.describe, options)):
        assert told == expected_attributes(rank, physical | logical, **changes)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_size_hint_is_what_a_buffer_takes(rank_pool, num_nodes):
    rank_pool(4, num_nodes=num_nodes).run(ep_unit_buffer.check_size_hint, num_nodes == 2)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_a_buffer_of_the_hinted_size_takes_what_it_was_sized_for(rank_pool, num_nodes):
    rank_pool(4, num_nodes=num_nodes).run(ep_unit_buffer.check_hinted_buffer_is_large_enough)


def test_a_dispatch_that_fits_exactly_passes_and_a_larger_one_is_refused(rank_pool):
    needed_bytes = {"16 bytes more a row": 4 * 512 * 1056, "one token more": 4 * 513 * 1024}
    # Top-3: 40 bytes of metadata, rounded up to 64.
    needed_bytes["one entry more"] = 4 * 512 * 1056
    for rank, refused in enumerate(rank_pool(4).run(ep_unit_buffer.fit_exactly)):
        assert refused.keys() == needed_bytes.keys()
        for name, message in refused.items():
            whole_bytes = math.ceil(needed_bytes[name] / (2 * MIB)) * 2 * MIB
            assert f"this dispatch needs a buffer of {whole_bytes} bytes" in message
            assert f"num_bytes={2 * MIB}" in message
            assert f"on rank {rank}" in message


NVLINK_GBS, RDMA_GBS = 430.3, 50.0


def expected_hits(num_groups: int, num_experts: int, num_topk: int) -> float:
    """Distinct groups that a token reaches, by the textbook."""
    missed = math.comb(num_experts - num_experts // num_groups, num_topk) / math.comb(num_experts, num_topk)
    return num_groups * (1 - missed)


def published_num_sms(num_scaleout: int, num_scaleup: int, num_nvlink: int, num_experts: int, num_topk: int) -> int:
    """The model as it is published, with the slower of the two links as the bound in direct mode too."""
    num_ranks = num_scaleout * num_scaleup
    ranks_hit = expected_hits(num_ranks, num_experts, num_topk)
    if num_scaleout > 1:
        nodes_hit = expected_hits(num_scaleout, num_experts, num_topk)
        read = (1 + nodes_hit) / ranks_hit
        write = (1 + nodes_hit / num_scaleout) / ranks_hit + 1
        rdma = nodes_hit * (1 - 1 / num_scaleout) / ranks_hit
        nvlink = 1 - 1 / num_scaleup
    else:
        read = 1 / ranks_hit
        write = (1 / ranks_hit if num_ranks > num_nvlink else 0) + num_nvlink / num_ranks
        nvlink = num_nvlink / num_ranks * (1 - 1 / num_nvlink)
        rdma = (num_ranks - num_nvlink) / num_ranks
    seconds = max(nvlink / NVLINK_GBS, rdma / RDMA_GBS)
    count = max(4, math.ceil(1.25 * max(read / 200, write / 50) / seconds))
    return count + count % 2


@pytest.mark.parametrize(
    ("num_nodes", "options", "domains"),
    [
        (1, {}, (1, 4, 4)),
        (2, {}, (2, 2, 2)),
        (2, {"allow_hybrid_mode": False}, (1, 4, 2)),
    ],
    ids=["one domain", "hybrid", "direct over two domains"],
)
def test_sm_and_qp_counts_follow_the_published_model(rank_pool, num_nodes, options, domains):
    problems = [(256, 8), (256, 6), (64, 1)]
    calls = [
        {"num_experts": num_experts, "num_topk": num_topk, "nvlink_gbs": NVLINK_GBS, "rdma_gbs": RDMA_GBS}
        for num_experts, num_topk in problems
    ]
    expected_sms = [published_num_sms(*domains, *problem) for problem in problems]
    # 16 a SM and one more, of 129; or one a SM and at most 9.
    is_direct = options.get("allow_hybrid_mode") is False
    expected_qps = [2, 4, 9, 9, 9] if is_direct else [33, 65, 129, 129, 129]
    results = rank_pool(4, num_nodes=num_nodes).run(ep_unit_buffer.estimates, options, calls, [2, 4, 10, 24, 160])
    assert results == [(expected_sms, expected_qps)] * 4


def test_no_more_qps_than_are_allocated(rank_pool):
    for allow_hybrid_mode in (True, False):
        options = {"num_allocated_qps": 5, "allow_hybrid_mode": allow_hybrid_mode}
        expected = [5, 5] if allow_hybrid_mode else [2, 5]
        assert rank_pool(4).run(ep_unit_buffer.estimates, options, [], [2, 24]) == [([], expected)] * 4


def test_barrier_takes_all_forms_of_its_arguments(rank_pool):
    rank_pool(4).run(ep_unit_calls.check_barrier_forms)


def test_barrier_waits_for_all_ranks(rank_pool):
    rank_pool(4).run(ep_unit_calls.check_barrier_waits_for_all)


def test_deterministic_changes_no_byte(rank_pool):
    rank_pool(4).run(ep_unit_calls.check_deterministic_is_the_same)


def test_subgroups_and_overlapping_groups(rank_pool):
    rank_pool(4).run(ep_unit_calls.check_groups)
