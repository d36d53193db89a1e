// Every operation of `comm/gin.cuh`, once around a ring of ranks.
#pragma once

#include <deep_ep_core/comm/gin.cuh>

namespace loopback_tests {

using deep_ep_core::comm::GinPlace;

struct GinRingParams {
    ncclDevComm dev_comm;
    ncclWindow_t window;
    deep_ep_core::comm::WaitParams wait;
    // In the windows of all ranks alike, in bytes.
    unsigned long long source_offset;
    unsigned long long signalled_offset;  // lands with a signal of its own
    unsigned long long covered_offset;    // lands before a strong signal that follows
    unsigned long long fetched_offset;
    unsigned long long value_offset;
    unsigned long long word_offset;
    unsigned long long num_bytes;
    unsigned long long round;       // of this context, from 1 on
    unsigned long long word_round;  // of all contexts
    unsigned long long timeout_cycles;
    int is_world;  // around all ranks, rather than those of a rail
    int context_idx;
    int has_local_waits;  // also gets and flushes, which have no deadline before NCCL 2.31
};

enum Phase : unsigned { kSignalled, kCovered, kValue };

inline constexpr unsigned long long kWordStep = 3;

// One block. Signals 0 and 1 are used, and the word.
__device__ __forceinline__ void gin_ring(const GinRingParams& p) {
    namespace comm = deep_ep_core::comm;
    const ncclGin gin(p.dev_comm, p.context_idx);
    const ncclTeam team = p.is_world != 0 ? ncclTeamWorld(p.dev_comm) : ncclTeamRail(p.dev_comm);
    const int next = (team.rank + 1) % team.nRanks;
    const int previous = (team.rank + team.nRanks - 1) % team.nRanks;
    const int previous_rank = ncclTeamRankToWorld(p.dev_comm, team, previous);
    const ncclCoopCta block;
    const GinPlace source{p.window, p.source_offset}, word{p.window, p.word_offset};

    // Weak: it vouches for the put that it rides on.
    comm::gin_put(gin, team, next, {p.window, p.signalled_offset}, source, p.num_bytes, ncclGin_WeakSignalInc{0},
                  ncclGin_None{}, block);
    // Strong: it vouches for the put before it.
    comm::gin_put(gin, team, next, {p.window, p.covered_offset}, source, p.num_bytes, ncclGin_None{}, ncclGin_None{},
                  block);
    comm::gin_signal(gin, team, next, ncclGin_StrongVASignalAdd{word.window, word.offset, kWordStep}, block);
    if (p.has_local_waits != 0)
        comm::gin_get(gin, team, next, source, {p.window, p.fetched_offset}, p.num_bytes, block);
    if (threadIdx.x == 0) {
        // Weak: the value is the put.
        comm::gin_put_value(gin, team, next, {p.window, p.value_offset}, p.round * 1000 + team.rank,
                            ncclGin_WeakSignalInc{1});
        [[maybe_unused]] bool is_in_time =
            comm::gin_wait_signal(gin, ncclGinSignal_t{0}, p.round, p.wait, kSignalled, previous_rank) &&
            comm::gin_wait_signal(gin, word, kWordStep * p.word_round, p.wait, kCovered, previous_rank) &&
            comm::gin_wait_signal(gin, ncclGinSignal_t{1}, p.round, p.wait, kValue, previous_rank);
    }
    __syncthreads();
    if (p.has_local_waits == 0) return;
    [[maybe_unused]] const bool are_gets_here = comm::gin_wait_gets(gin, team, next, p.timeout_cycles, block);
    [[maybe_unused]] const bool is_flushed = comm::gin_flush(gin, p.timeout_cycles, block);
}

}  // namespace loopback_tests
