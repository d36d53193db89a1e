// A barrier over the ranks of an LSA team, by flags that they set in each other's windows.
//
// Each rank has, at the same offset of its window, one slot a block that takes part: block b of every rank meets block
// b of the others. Round e of a slot: each rank writes e into its place in the slots of all peers, then waits until all
// places of its own slot hold at least e. The epoch lives in the slot and is counted by the device, so that nothing
// depends on the host and a CUDA graph that is replayed goes on where it stopped. A slot is zero before its first round
// and is never reset.
#pragma once

#include <deep_ep_core/comm/flag.cuh>
#include <deep_ep_core/comm/lsa_team.cuh>

namespace deep_ep_core::comm {

// Mirrored in `deep_ep_core.barrier`. A multiple of 128 bytes, so that slots share no cache line.
struct LsaBarrierSlot {
    unsigned long long arrived[kMaxLsaRanks];  // the round that each rank has come to, written by that rank
    unsigned long long epoch;                  // the round that this rank has begun, touched by its own block only
    unsigned long long padding[7];
};

// Meets the same block of all ranks of the team. Called by all threads of a block together; one block a slot at a time.
//
// Order: what any thread of any of these blocks did before is visible to every thread of them afterwards, as with
// `__syncthreads` in one block. Bulk stores must be complete before (`ptx::bulk_wait<0>`, by the threads that issued
// them). Bulk copies afterwards, from or to bytes that any rank reached by plain loads and stores before, need
// `ptx::fence_proxy_async_global` first, by the thread that issues them.
//
// slot_offset: where the slot is in the windows, in bytes; a multiple of 8.
// wait, phase_idx: see `wait_until`.
//
// Returns, in all threads alike, whether all ranks have come. When a rank is late the others leave with false, the
// round counts nevertheless, and the late one finds it complete when it comes.
[[nodiscard]] __device__ __forceinline__ bool lsa_barrier(const LsaTeam& team, unsigned long long slot_offset,
                                                          const WaitParams& wait, unsigned phase_idx) {
    LsaBarrierSlot* own = window_pointer<LsaBarrierSlot>(team, team.rank, slot_offset);
    // Plain accesses will do for the epoch: only this block touches it, its rounds are ordered by the barriers below,
    // and its kernels by their stream.
    const unsigned long long epoch = own->epoch + 1;
    // Orders what all threads of the block wrote before the releases below. Also, all have read the epoch.
    __syncthreads();
    const int thread_idx = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
    // All flags are set before any is waited for: a thread that has two peers must not let one wait for the other. Each
    // is a release at system scope, and releases are cumulative. It also publishes what the other threads wrote before
    // the barrier above, and what earlier kernels of this stream wrote.
    for (int peer = thread_idx; peer < team.num_ranks; peer += num_threads) {
        if (peer != team.rank)
            publish_flag(&window_pointer<LsaBarrierSlot>(team, peer, slot_offset)->arrived[team.rank], epoch);
    }
    bool has_come = true;
    for (int peer = thread_idx; peer < team.num_ranks; peer += num_threads) {
        if (peer != team.rank)
            has_come &= wait_flag(&own->arrived[peer], epoch, wait, phase_idx, group_rank(team, peer));
    }
    if (thread_idx == 0) own->epoch = epoch;
    // Hands what the waiting threads have acquired to the whole block, and the new epoch to its next round.
    return __syncthreads_and(has_come) != 0;
}

}  // namespace deep_ep_core::comm
