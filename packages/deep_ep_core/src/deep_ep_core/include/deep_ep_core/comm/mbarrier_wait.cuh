// A wait for a phase of an mbarrier, with a deadline: a bulk load from a peer that has gone may never complete.
#pragma once

#include <deep_ep_core/comm/deadline.cuh>
#include <deep_ep_core/ptx/mbarrier.cuh>

namespace deep_ep_core::comm {

// Waits until the phase of this parity has ended. Called by any number of threads of the block. An acquire in the
// block: what the arriving threads wrote, and what bulk loads brought, can be read afterwards.
//
// False if that did not happen in time; see `wait_until` for this and for the last three arguments. `peer` is the rank
// whose memory the load reads, or the own one. A report shows the parity, as expected, and the other one as seen. Each
// poll may be suspended for about 10 us (`ptx::kSuspendNs`), so the wait ends within about 0.5 ms of its deadline.
//
// A copy that was issued cannot be taken back: after false it may still write to its shared memory. So wait by a flag
// for what may be late, and issue the load when the flag has come; then only a broken link can keep it.
[[nodiscard]] __device__ __forceinline__ bool wait_mbarrier(unsigned long long* barrier, unsigned parity,
                                                            const WaitParams& wait, unsigned phase_idx, int peer) {
    return wait_until(wait, phase_idx, peer, parity, [barrier, parity](unsigned long long& seen) {
        seen = parity ^ 1u;
        return ptx::mbarrier_try_wait(barrier, parity);
    });
}

}  // namespace deep_ep_core::comm
