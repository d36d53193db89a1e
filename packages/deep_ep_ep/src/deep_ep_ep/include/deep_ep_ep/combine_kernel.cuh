// Combine inside one LSA team, as one kernel: open, push what must be pushed, sum up, leave.
//
// `deep_ep_ep.device.combine_kernel` mirrors the structs. All blocks of all ranks wait for each other, so all must be
// resident at once.
#pragma once

#include <deep_ep_ep/pull.cuh>
#include <deep_ep_ep/push.cuh>

namespace deep_ep_ep {

// Rows that this rank received from another in the dispatch.
__device__ __forceinline__ unsigned long long num_received_from(const CombineParams& p, int rank) {
    const int begin = rank == 0 ? 0 : p.recv_row_ends[rank - 1];
    return static_cast<unsigned long long>(p.recv_row_ends[rank] - begin);
}

// Waits until all peers have read what they need of this rank's x, so that it may be overwritten once the kernel has
// ended. Called by all threads of one block. A late peer is in the record.
__device__ __forceinline__ void wait_for_readers(const CombineParams& p) {
    const Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, p.team.rank, p.arrivals_offset);
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += static_cast<int>(blockDim.x)) {
        const unsigned long long num_expected = p.state->num_pulled[peer] + num_received_from(p, peer);
        [[maybe_unused]] const bool has_come = comm::wait_flag(&arrivals->num_pulled[peer], num_expected, p.wait,
                                                               kPhasePull, comm::group_rank(p.team, peer));
    }
}

// Counts what this operation has moved, so that the next one knows where the peers' counts begin. Called by all
// threads of the last block.
__device__ __forceinline__ void count_moved(const CombineParams& p, const PeerOpenings& peers) {
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += static_cast<int>(blockDim.x)) {
        if (p.has_weights || is_pusher(peers, peer))
            p.state->num_pushed[peer] += static_cast<unsigned long long>(p.num_send_rows[peer]);
        if (p.opening.told[0] != kPushed) p.state->num_pulled[peer] += num_received_from(p, peer);
    }
}

// The kernel's body, for blocks of `RowRing::kNumWarps` warps and `RowRing::kNumBlockBytes` of dynamic shared memory.
//
// When a wait has expired, in this kernel or in one before, blocks skip what is left: what dispatch left may then
// be anything. They still leave in good order, so that the epoch is counted.
template <CombineConfig kConfig>
__device__ __forceinline__ void combine(const CombineParams& p) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ CombineShared shared;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned long long epoch = p.state->epoch + 1;
    for (int rank = static_cast<int>(threadIdx.x); rank < comm::kMaxLsaRanks; rank += static_cast<int>(blockDim.x))
        shared.num_pushed[rank] = shared.num_pulled[rank] = 0;
    RowStream<kConfig.row_type> stream(
        p.wait,
        RowRing(stages + warp * (RowRing::kNumStages * RowRing::kPieceBytes), shared.barriers[warp], lane),
        shared.lists[warp], p.row_bytes, warp, lane);

    if (blockIdx.x == 0) send_opening(p.team, p.opening_offset, p.opening, epoch);
    // Behind its barrier the counts above are zero for all threads.
    const bool has_opened = receive_openings(p.team, p.opening_offset, p.opening, epoch, p.wait, shared.peers);
    bool is_right = __syncthreads_and(has_opened && !comm::has_expired(p.wait)) != 0;
    is_right = is_right && push<kConfig.row_type>(p, shared, stream, lane);
    is_right = is_right && pull<kConfig.row_type, kConfig.has_wide_idx>(p, shared, stream, lane);
    if (is_right && blockIdx.x == 0 && p.opening.told[0] != kPushed) wait_for_readers(p);

    if (!is_last_block(p.state)) return;
    if (has_opened) count_moved(p, shared.peers);
    if (threadIdx.x == 0) p.state->epoch = epoch;
}

}  // namespace deep_ep_ep
