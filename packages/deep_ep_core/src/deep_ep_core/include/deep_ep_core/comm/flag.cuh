// Flags: words of 64 bits that only grow, by which one thread tells another that something is done.
//
// A flag holds an epoch (the number of a round, from 1 on) or a count. It is never reset, so there is no moment at
// which a late rank could see the wrong zero, and 64 bits do not wrap. The waiting side waits for "at least": a partner
// that is a round ahead does not confuse it. A flag lies in the memory of the rank that waits for it; polling crosses
// no link.
//
// Order: `publish_flag` and `raise_flag` are releases, `wait_flag` is an acquire. What the publishing thread wrote
// before, to any rank's memory, is visible to the waiting thread afterwards; so is what other threads of its block
// wrote, if a barrier of the block (`__syncthreads`) stands between their writes and the release. Likewise the other
// threads of the waiting block may read behind a barrier that follows the wait. Bulk copies need two more things:
// stores must be complete (`ptx::bulk_wait<0>`, by the thread that issued them) before the release; and copies behind
// the wait, from or to bytes that the other side reached by plain accesses, need `ptx::fence_proxy_async_global`
// between the wait and the copy.
//
// Scope: kSys if the two threads can be on different GPUs or in different processes; kGpu between blocks of one GPU.
#pragma once

#include <deep_ep_core/comm/deadline.cuh>
#include <deep_ep_core/ptx/red.cuh>

namespace deep_ep_core::comm {

// Sets a flag. Called by one thread; no other thread writes this flag.
template <ptx::Scope kScope = ptx::Scope::kSys>
__device__ __forceinline__ void publish_flag(unsigned long long* flag, unsigned long long value) {
    ptx::st_release<kScope>(flag, value);
}

// Adds to a flag that several threads raise. Called by one thread. Who sees the sum sees what all of them wrote.
template <ptx::Scope kScope = ptx::Scope::kSys>
__device__ __forceinline__ void raise_flag(unsigned long long* flag, unsigned long long amount) {
    ptx::red_add_release<kScope>(flag, amount);
}

// Waits until a flag is at least `value`. Called by one thread. False if that did not happen in time; see `wait_until`
// for this and for the last three arguments.
template <ptx::Scope kScope = ptx::Scope::kSys>
[[nodiscard]] __device__ __forceinline__ bool wait_flag(const unsigned long long* flag, unsigned long long value,
                                                        const WaitParams& wait, unsigned phase_idx, int peer) {
    // Every poll is an acquire: the one that succeeds must be, and a second load just for that would cost another trip.
    return wait_until(wait, phase_idx, peer, value, [flag, value](unsigned long long& seen) {
        seen = ptx::ld_acquire<kScope>(flag);
        return seen >= value;
    });
}

}  // namespace deep_ep_core::comm
