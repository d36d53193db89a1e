// The receiving end of a dispatch across nodes: as in one node (`../receive_rows.cuh`), once the rows of every source
// have come.
#pragma once

#include <deep_ep_ep/network/dispatch_params.cuh>
#include <deep_ep_ep/receive_rows.cuh>

namespace deep_ep_ep {

__device__ __forceinline__ int num_received_of(const NetworkDispatchParams& p, int source) {
    return p.local.recv_row_ends[source] - (source > 0 ? p.local.recv_row_ends[source - 1] : 0);
}

// Waits until the rows of all sources have come. Called by all threads of each block; the same answer in all of them.
[[nodiscard]] __device__ __forceinline__ bool wait_for_sources(const NetworkDispatchParams& p) {
    const Network& net = p.net;
    bool have_come = !comm::has_expired(net.wait);
    for (int source = static_cast<int>(threadIdx.x); have_come && source < net.num_ranks; source += kNumThreads) {
        const unsigned long long least =
            total_of(net, kWordArrived, source) + static_cast<unsigned>(num_received_of(p, source));
        have_come = comm::wait_flag(word_at(net, net.team.rank, kWordArrived, source), least, net.wait, kPhaseArrive,
                                    source);
    }
    return __syncthreads_and(have_come) != 0;
}

// The kernel's body, for blocks of `kNumThreads`, with the dynamic shared memory of the stages.
template <NetworkIndexConfig kConfig>
__device__ __forceinline__ void receive_rows_of_sources(const NetworkDispatchParams& p) {
    using Index = typename IndexOf<kConfig.is_idx64>::Type;
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ unsigned long long stage_barriers[kNumWarps];
    const Network& net = p.net;
    init_stages(stage_barriers);
    __syncthreads();
    RowStage stage = row_stage(p.local, smem, stage_barriers);
    const bool is_right = wait_for_sources(p);
    if (is_right) {
        write_sides<Index>(p.local, p.local.recv_row_ends, all_threads());
        if (p.local.is_staged || p.local.do_expand)
            copy_rows_on(p.local, stage, p.local.recv_row_ends[net.num_ranks - 1]);
        if (p.local.do_zero_padding) zero_gaps(p.local);
    }
    if (!is_last_block(net.state) || !is_right) return;
    // All blocks have seen the old totals.
    for (int source = static_cast<int>(threadIdx.x); source < net.num_ranks; source += kNumThreads)
        total_of(net, kWordArrived, source) += static_cast<unsigned>(num_received_of(p, source));
    for (int relay = static_cast<int>(threadIdx.x); relay < num_relays(net); relay += kNumThreads)
        if (relay != own_relay(net))
            total_of(net, kWordRows, relay_rank(net, relay)) +=
                static_cast<unsigned>(num_chunks(relay_counts(p, kRelayComing)[relay], p.chunk_rows));
}

}  // namespace deep_ep_ep
