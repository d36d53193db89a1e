// Dispatch inside one LSA team, as one kernel or as two.
//
// Plan and place in one kernel: nothing is read back by the host, and results have the worst case's size; a CUDA graph
// may hold it. Plan alone, then place alone: the host reads the counts between them and makes results of the right
// size. Place alone also repeats a plan that was kept. The blocks of all ranks' kernels wait for each other, so all
// blocks of a kernel must be resident at once.
#pragma once

#include <deep_ep_ep/place_rows.cuh>
#include <deep_ep_ep/plan_rows.cuh>
#include <deep_ep_ep/receive_rows.cuh>

namespace deep_ep_ep {

// What the parts of the kernel share, beside the dynamic shared memory.
struct DispatchMemory {
    PeerOpenings peers;
    unsigned long long stage_barriers[kNumWarps];
    int row_ends[comm::kMaxLsaRanks];  // inclusive prefix sum of the rows that come from each rank
    int num_sent[comm::kMaxLsaRanks];
    unsigned invalid_token;
};

// Opens the operation and plans. Called by all threads of each block. False if the kernel must end.
template <class Index>
[[nodiscard]] __device__ __forceinline__ bool open_and_plan(const DispatchParams& p, unsigned long long epoch,
                                                            DispatchMemory& shared, unsigned char* smem, int begin,
                                                            int end) {
    const PlanMemory memory = plan_memory(p, smem);
    if (!count_tokens<Index>(p, memory, begin, end, &shared.invalid_token)) return false;
    if (blockIdx.x == 0) send_opening(p.team, p.opening_offset, p.opening, epoch, shared.invalid_token);
    // Counts of tokens that are wrong are of no harm: no rank goes on from the opening.
    send_counts(p, memory.counts, epoch);
    if (!receive_openings(p.team, p.opening_offset, p.opening, epoch, p.wait, shared.peers)) return false;
    if (!receive_counts(p, epoch, memory.totals, memory.before_us, shared.row_ends)) return false;
    if (blockIdx.x == 0) write_sums(p, memory, shared.row_ends);
    __syncthreads();
    find_first_rows(p, memory);
    if (threadIdx.x == 0) {
        for (int rank = 1; rank < p.team.num_ranks; ++rank) shared.row_ends[rank] += shared.row_ends[rank - 1];
    }
    __syncthreads();
    write_rows<Index>(p, memory, begin, end, &shared.invalid_token);
    // The memory of the plan becomes that of the stages.
    ptx::fence_proxy_async_shared();
    __syncthreads();
    return true;
}

// Opens the operation with the plan of an earlier kernel.
[[nodiscard]] __device__ __forceinline__ bool open_planned(const DispatchParams& p, unsigned long long epoch,
                                                           DispatchMemory& shared) {
    if (blockIdx.x == 0) send_opening(p.team, p.opening_offset, p.opening, epoch);
    for (int rank = static_cast<int>(threadIdx.x); rank < p.team.num_ranks; rank += kNumThreads)
        shared.row_ends[rank] = p.recv_row_ends[rank];
    if (!receive_openings(p.team, p.opening_offset, p.opening, epoch, p.wait, shared.peers)) return false;
    // After a failure of the kernel that planned, its plan may be anything, and stores by it would go anywhere.
    return __syncthreads_or(threadIdx.x == 0 && comm::has_expired(p.wait)) == 0;
}

// Moves rows. Called by all threads of each block. False if a wait has expired.
template <class Index, bool kHasPlan>
[[nodiscard]] __device__ __forceinline__ bool place_and_receive(const DispatchParams& p, DispatchMemory& shared,
                                                                unsigned char* smem, int begin, int end) {
    RowStage stage = row_stage(p, smem, shared.stage_barriers);
    send_rows<Index>(p, shared.peers, stage, begin, end, shared.num_sent);
    announce_rows(p, shared.num_sent);
    if (!wait_for_rows(p, shared.row_ends)) return false;
    const int num_rows = shared.row_ends[p.team.num_ranks - 1];
    if (p.is_staged || (p.do_expand && !p.fans_out_at_sender)) copy_rows_on(p, stage, num_rows);
    if (p.recv_topk_idx != nullptr || p.recv_topk_weights != nullptr || p.metadata != nullptr)
        write_row_facts<Index>(p, shared.row_ends, num_rows);
    if (p.recv_sf != nullptr) write_scales(p, num_rows);
    if (p.do_zero_padding) {
        // The counts of experts are written by one block, in this kernel or in an earlier one.
        if (kHasPlan && !meet_grid(p.state, p.wait)) return false;
        zero_gaps(p);
    }
    return true;
}

// The kernel's body. A timeout or a disagreement is in the record; the kernel itself ends all the same.
template <DispatchConfig kConfig>
__device__ __forceinline__ void run_dispatch(const DispatchParams& p) {
    static_assert(kConfig.has_plan || kConfig.has_place, "a dispatch plans, places, or both");
    using Index = typename IndexOf<kConfig.is_idx64>::Type;
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ DispatchMemory shared;
    const unsigned long long epoch = p.state->epoch + 1;
    const int begin = first_token(p, blockIdx.x), end = first_token(p, blockIdx.x + 1);
    for (int rank = static_cast<int>(threadIdx.x); rank < p.team.num_ranks; rank += kNumThreads)
        shared.num_sent[rank] = 0;
    init_stages(shared.stage_barriers);
    __syncthreads();
    bool is_right;
    if constexpr (kConfig.has_plan)
        is_right = open_and_plan<Index>(p, epoch, shared, smem, begin, end);
    else
        is_right = open_planned(p, epoch, shared);
    bool has_moved = false;
    if constexpr (kConfig.has_place) {
        if (is_right) has_moved = place_and_receive<Index, kConfig.has_plan>(p, shared, smem, begin, end);
    }
    if (!is_last_block(p.state)) return;
    // All blocks have seen the old epoch and the old totals.
    if (has_moved) {
        for (int rank = static_cast<int>(threadIdx.x); rank < p.team.num_ranks; rank += kNumThreads)
            p.state->num_arrived[rank] += shared.row_ends[rank] - (rank > 0 ? shared.row_ends[rank - 1] : 0);
    }
    if (threadIdx.x == 0) {
        p.state->invalid_token = 0;
        p.state->epoch = epoch;
    }
}

}  // namespace deep_ep_ep
