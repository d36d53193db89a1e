"""The low-latency kernels and their mirrors: what Python and kernels must have alike, sizes, and the launch."""

from __future__ import annotations

import random

from deep_ep_legacy import Buffer
from deep_ep_legacy.device import low_latency_kernels, low_latency_memory


def test_sizes_and_constants_agree_with_their_mirrors(compile_without_warnings) -> None:
    """What Python allots, counts or compares on its own, and what the kernels make of it."""
    equal: dict[str, int] = {
        "sizeof(LatencyState)": low_latency_memory.STATE_BYTES,
        "kNumThreads": low_latency_kernels.NUM_THREADS,
        "kMaxExperts": low_latency_memory.MAX_NUM_EXPERTS,
        "kRoundEntries": low_latency_memory.MAX_NUM_TOPK,
        "kPhaseDecide + 1": len(low_latency_memory.PHASES),
        "kNoteTooMany + 1": len(low_latency_memory.NOTES),
    }
    lines = ["#include <deep_ep_legacy/low_latency/combine_kernel.cuh>"]
    lines += [
        "#include <deep_ep_legacy/low_latency/dispatch_kernel.cuh>",
        "using namespace deep_ep_legacy::low_latency;",
    ]
    lines += [f"static_assert({name} == {value});" for name, value in equal.items()]
    compile_without_warnings("\n".join(lines) + "\n", "sm_90a")


def test_buffer_of_v1_size_holds_what_a_call_needs() -> None:
    """For every call: callers pass the hint, and must not be refused."""
    choose = random.Random(0)
    for _ in range(5000):
        num_ranks, experts_per_rank = choose.choice((1, 2, 4, 8, 16)), choose.randint(1, 64)
        num_max_tokens, hidden = choose.randint(1, 600), 128 * choose.randint(1, 80)
        num_experts = num_ranks * experts_per_rank
        hint = Buffer.get_low_latency_rdma_size_hint(num_max_tokens, hidden, num_ranks, num_experts)
        slot_bytes = max(
            *(low_latency_memory.dispatch_slot_bytes(hidden, use_fp8=use_fp8) for use_fp8 in (True, False)),
            *(low_latency_memory.combine_slot_bytes(hidden, use_logfmt=use_logfmt) for use_logfmt in (True, False)),
        )
        needed_bytes = num_experts * num_max_tokens * slot_bytes
        assert needed_bytes <= low_latency_memory.slab_bytes(hint), (num_max_tokens, hidden, num_experts)
        # With the buffers that zero-copy calls are given, the memory is about V1's.
        assert 2 * low_latency_memory.slab_bytes(hint) <= 0.54 * hint + 256


def test_launch_has_a_block_for_each_sm_and_room_for_its_tables() -> None:
    shape = low_latency_kernels.launch_shape(num_sms=16, num_experts=256)
    assert (shape.grid, shape.block, shape.smem_bytes) == ((16, 1, 1), (512, 1, 1), 4 * 513)
