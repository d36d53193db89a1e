// The barrier as a kernel of its own: one block, between two kernels of a stream.
//
// Launched by `deep_ep_core.barrier.LsaBarrier`, which mirrors the parameters.
#pragma once

#include <deep_ep_core/comm/lsa_barrier.cuh>

namespace deep_ep_core::comm {

struct LsaBarrierParams {
    LsaTeam team;
    WaitParams wait;
    unsigned long long slot_offset;  // of a single slot, in the windows
};

// The kernel's body, for one block. What came before it in the streams of all ranks is visible to what comes after it:
// the end of a kernel hands its writes to the next one, and the barrier hands them on to the peers. A timeout is in the
// record; the kernel itself ends all the same.
__device__ __forceinline__ void run_lsa_barrier(const LsaBarrierParams& p) {
    constexpr unsigned kOnlyPhase = 0;
    [[maybe_unused]] const bool have_all_come = lsa_barrier(p.team, p.slot_offset, p.wait, kOnlyPhase);
}

}  // namespace deep_ep_core::comm
