"""The kernels of V1's normal calls and their mirrors: what Python and kernels must have alike."""

from __future__ import annotations

from deep_ep_core.jit import mirror_source
from deep_ep_legacy.device import normal_failures, normal_kernels


def test_state_and_constants_agree_with_their_mirrors(compile_without_warnings) -> None:
    """What Python allots, counts or compares on its own, and what the kernels make of it."""
    equal = {
        "sizeof(OpeningSlots)": normal_kernels.OPENING_SLOTS_BYTES,
        "kNumAgreed": normal_kernels.NUM_AGREED,
        "kNumThreads": normal_kernels._NUM_THREADS,
        "kMaxLocalExperts": normal_kernels.MAX_LOCAL_EXPERTS,
        "kMaxBiases": normal_kernels._MAX_BIASES,
        "DispatchStage::kHeadBytes": normal_kernels._HEAD_BYTES,
        "kPhaseDisagree": normal_failures.PHASE_DISAGREE,
        "kPhaseClaim": normal_failures.PHASE_CLAIM,
        "kPhaseWorst": normal_failures.PHASE_WORST,
        "kPhaseWorst + 1": len(normal_failures.PHASES),
        "sizeof(comm::Message)": normal_kernels.counts_bytes(2) // (2 * 2 * (2 + normal_kernels.MAX_LOCAL_EXPERTS)),
    }
    source = "\n".join(
        [
            mirror_source("deep_ep_legacy/normal/rank_state.cuh", [normal_kernels.RankState, normal_kernels.Flags]),
            "#include <deep_ep_legacy/normal/combine_kernel.cuh>",
            "#include <deep_ep_legacy/normal/plan_kernel.cuh>",
            "using namespace deep_ep_legacy::normal;",
            *(f"static_assert({name} == {value});" for name, value in equal.items()),
        ]
    )
    compile_without_warnings(source, "sm_90a")
