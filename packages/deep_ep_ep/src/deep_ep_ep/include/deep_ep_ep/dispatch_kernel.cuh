// Dispatch inside one LSA team, as one kernel or as two, of three parts: plan, place, receive.
//
// All in one: nothing is read back by the host, and results have the worst case's size; a CUDA graph may hold it. Plan
// and place, then receive: the host reads the counts while rows move, and makes results of the right size. Plan alone,
// then the rest: rows need a place of the right size before they move. Place and receive also repeat a plan that was
// kept. The blocks of all ranks' kernels wait for each other, so all blocks of a kernel must be resident at once.
#pragma once

#include <deep_ep_ep/place_rows.cuh>
#include <deep_ep_ep/plan_rows.cuh>
#include <deep_ep_ep/receive_rows.cuh>
#include <deep_ep_ep/side_records.cuh>

namespace deep_ep_ep {

// What the parts of the kernel share, beside the dynamic shared memory.
struct DispatchMemory {
    PeerOpenings peers;
    SideMemory sides;
    unsigned long long stage_barriers[kNumWarps];
    int row_ends[comm::kMaxLsaRanks];  // inclusive prefix sum of the rows that come from each rank
    int num_sent[comm::kMaxLsaRanks];
    unsigned invalid_token;
};

// Opens the operation and plans. Called by all threads of each block. False if the kernel must end.
template <class Index, bool kHasPlace>
[[nodiscard]] __device__ __forceinline__ bool open_and_plan(const DispatchParams& p, unsigned long long epoch,
                                                            DispatchMemory& shared, unsigned char* smem,
                                                            RowStage& stage, int begin, int end) {
    const PlanMemory memory = plan_memory(p, smem);
    if (!count_tokens<Index>(p, memory, begin, end, &shared.invalid_token)) return false;
    if (blockIdx.x == 0) send_opening(p.team, p.opening_offset, p.opening, epoch, shared.invalid_token);
    // Counts of tokens that are wrong are of no harm: no rank goes on from the opening.
    send_counts(p, memory.counts, epoch);
    // While the counts travel. Not before the tokens are counted: that would wait behind the rows.
    if (kHasPlace && p.stages_offset > 0) load_ahead(p, stage, begin, end);
    if (!receive_openings(p.team, p.opening_offset, p.opening, epoch, p.wait, shared.peers)) return false;
    if (!receive_counts(p, epoch, memory.totals, memory.before_us, shared.row_ends)) return false;
    if (threadIdx.x < 32) {
        int next = 0;
        for (int first = 0; first < p.team.num_ranks; first += 32) {
            const int rank = first + static_cast<int>(threadIdx.x);
            const int end = next + sum_up_to_lane(rank < p.team.num_ranks ? shared.row_ends[rank] : 0);
            next = __shfl_sync(0xffffffffu, end, 31);
            if (rank < p.team.num_ranks) shared.row_ends[rank] = end;
        }
    }
    __syncthreads();
    if (blockIdx.x == 0) write_sums(p, memory, shared.row_ends);
    __syncthreads();
    find_first_rows(p, memory);
    __syncthreads();
    write_rows<Index>(p, memory, begin, end, &shared.invalid_token);
    // The memory of the plan becomes that of the stages.
    ptx::fence_proxy_async_shared();
    __syncthreads();
    return true;
}

// Takes the plan of an earlier kernel, and opens the operation if rows are to move. False if the kernel must end.
template <bool kOpens>
[[nodiscard]] __device__ __forceinline__ bool take_plan(const DispatchParams& p, unsigned long long epoch,
                                                        DispatchMemory& shared) {
    for (int rank = static_cast<int>(threadIdx.x); rank < p.team.num_ranks; rank += kNumThreads)
        shared.row_ends[rank] = p.recv_row_ends[rank];
    if constexpr (kOpens) {
        if (blockIdx.x == 0) send_opening(p.team, p.opening_offset, p.opening, epoch);
        if (!receive_openings(p.team, p.opening_offset, p.opening, epoch, p.wait, shared.peers)) return false;
    }
    // After a failure of the kernel that planned, its plan may be anything, and stores by it would go anywhere.
    return __syncthreads_or(threadIdx.x == 0 && comm::has_expired(p.wait)) == 0;
}

// Moves rows and what lies beside them, and writes the latter into the results if that is a part of this kernel. Called
// by all threads of each block. False if a wait has expired.
template <class Index, bool kHasReceive>
[[nodiscard]] __device__ __forceinline__ bool place(const DispatchParams& p, DispatchMemory& shared, RowStage& stage,
                                                    int begin, int end) {
    if (threadIdx.x < kNumRowWarps * 32) {
        send_rows<Index>(p, shared.peers, stage, begin, end, shared.num_sent);
    } else {
        send_sides<Index>(p, shared.peers, shared.sides, begin, end);
        const bool have_come = wait_for_sides(p, shared.sides, shared.row_ends);
        if (kHasReceive && have_come) write_sides<Index>(p, shared.row_ends, side_threads());
    }
    announce_rows(p, shared.num_sent);
    return wait_for_rows(p, shared.row_ends) && shared.sides.have_come != 0;
}

// Writes what is still missing of the results. Called by all threads of each block, when all rows have come.
// `has_plan`: the plan was made in this kernel.
__device__ __forceinline__ void finish_rows(const DispatchParams& p, DispatchMemory& shared, RowStage& stage,
                                            bool has_plan) {
    if (p.is_staged || (p.do_expand && !p.fans_out_at_sender))
        copy_rows_on(p, stage, shared.row_ends[p.team.num_ranks - 1]);
    if (p.do_zero_padding) {
        // The counts of experts are written by one block, in this kernel or in an earlier one.
        if (has_plan && !meet_grid(p.state, p.wait)) return;
        zero_gaps(p);
    }
}

// The kernel's body. A timeout or a disagreement is in the record; the kernel itself ends all the same.
template <DispatchConfig kConfig>
__device__ __forceinline__ void run_dispatch(const DispatchParams& p) {
    constexpr bool kMeetsPeers = kConfig.has_plan || kConfig.has_place;
    static_assert(kMeetsPeers || kConfig.has_receive, "a dispatch has some part");
    using Index = typename IndexOf<kConfig.is_idx64>::Type;
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ DispatchMemory shared;
    const unsigned long long epoch = p.state->epoch + 1;
    const int begin = first_token(p, blockIdx.x), end = first_token(p, blockIdx.x + 1);
    for (int rank = static_cast<int>(threadIdx.x); rank < p.team.num_ranks; rank += kNumThreads)
        shared.num_sent[rank] = 0;
    init_sides(shared.sides);
    init_stages(shared.stage_barriers);
    __syncthreads();
    RowStage stage = row_stage(p, smem, shared.stage_barriers);
    if (kConfig.has_place && !kConfig.has_plan) load_ahead(p, stage, begin, end);
    bool is_right;
    if constexpr (kConfig.has_plan)
        is_right = open_and_plan<Index, kConfig.has_place>(p, epoch, shared, smem, stage, begin, end);
    else
        is_right = take_plan<kConfig.has_place>(p, epoch, shared);
    if constexpr (kConfig.has_place) {
        // A copy that is under way must not outlive the block.
        if (!is_right && stage.is_loading) is_right = end_load(p, stage) && false;
        is_right = is_right && place<Index, kConfig.has_receive>(p, shared, stage, begin, end);
    }
    if constexpr (kConfig.has_receive) {
        if (is_right && !kConfig.has_place) write_sides<Index>(p, shared.row_ends, all_threads());
        if (is_right) finish_rows(p, shared, stage, kConfig.has_plan);
    }
    if constexpr (kMeetsPeers) {
        if (!is_last_block(p.state)) return;
        // All blocks have seen the old epoch and the old totals.
        if (kConfig.has_place && is_right) {
            for (int rank = static_cast<int>(threadIdx.x); rank < p.team.num_ranks; rank += kNumThreads) {
                const int count = shared.row_ends[rank] - (rank > 0 ? shared.row_ends[rank - 1] : 0);
                p.state->num_arrived[rank] += count;
                p.state->num_sides[rank] += count;
            }
        }
        if (threadIdx.x == 0) {
            p.state->invalid_token = 0;
            p.state->epoch = epoch;
        }
    }
}

}  // namespace deep_ep_ep
