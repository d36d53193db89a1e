// Makes ready, in this rank's window, what the ranks of its node will read: rows that do not lie there, the sums of
// rows by expert, and weights.
//
// It runs before the operation opens. It may: the ranks of the node have read what the last combine put there, and no
// other kind of operation has anything there that a network card may still read.
#pragma once

#include <deep_ep_ep/network/combine_params.cuh>

namespace deep_ep_ep {

// For each item one row: the sum of a received token's rows by expert, or a copy.
class StageJobs {
   public:
    struct Entry {
        int row;  // of x that this lane stands for, or -1
    };

    __device__ __forceinline__ StageJobs(const NetworkCombineParams& p, int lane) : p_(p), lane_(lane) {}

    __device__ __forceinline__ Entry load(int item) const {
        if (!sums_on_own_rank(p_)) return Entry{lane_ == 0 ? item : -1};
        const long long first = static_cast<long long>(item) * (p_.num_topk + 2) + 2;
        return Entry{lane_ < p_.num_topk ? p_.metadata[first + lane_] : -1};
    }

    __device__ __forceinline__ RowJob make(const Entry& entry, int item, RowLists& lists, bool) const {
        const unsigned have_rows = __ballot_sync(kAllLanes, entry.row >= 0);
        if (entry.row >= 0)
            lists.rows[__popc(have_rows & ((1u << lane_) - 1))] =
                static_cast<const char*>(p_.x) + static_cast<long long>(entry.row) * p_.row_bytes;
        if (lane_ == 0) lists.outs[0] = static_cast<char*>(p_.staged_x) + static_cast<long long>(item) * p_.row_bytes;
        RowJob job;
        job.num_rows = __popc(have_rows);
        job.is_copy = job.num_rows <= 1;
        return job;
    }

   private:
    const NetworkCombineParams& p_;
    int lane_;
};

// Writes the weights by token: 0 where an entry is not of this rank and x is by expert. Called by all threads.
__device__ __forceinline__ void stage_weights(const NetworkCombineParams& p, long long num_rows) {
    const long long num = num_rows * p.num_topk;
    const long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (long long i = first; i < num; i += static_cast<long long>(gridDim.x) * blockDim.x) {
        float weight;
        if (p.do_expand) {
            const int row = p.metadata[i / p.num_topk * (p.num_topk + 2) + 2 + i % p.num_topk];
            weight = row >= 0 ? p.weights[row] : 0;
        } else {
            weight = p.weights[i];
        }
        p.staged_weights[i] = weight;
    }
}

// The kernel's body, for blocks of `RowRing::kNumWarps` warps and `RowRing::kNumBlockBytes` of dynamic shared memory.
template <NetworkCombineConfig kConfig>
__device__ __forceinline__ void stage_rows_for_node(const NetworkCombineParams& p) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ StreamShared shared;
    if (comm::has_expired(p.net.wait)) return;
    RowStream<kConfig.row_type> stream = row_stream<kConfig.row_type>(p, shared, stages);
    const int lane = static_cast<int>(threadIdx.x) % 32, num_local_experts = p.num_experts / p.net.num_ranks;
    const int num_recv = p.recv_row_ends[p.net.num_ranks - 1];
    if (p.has_weights) stage_weights(p, num_recv);
    if (p.staged_x == nullptr) return;
    const int num_items = p.do_expand && p.is_single_rounding ? p.expert_ends[num_local_experts - 1] : num_recv;
    // x may have been written by plain stores, and is read by bulk copies.
    ptx::fence_proxy_async_global();
    [[maybe_unused]] const bool is_done = stream.run(
        StageJobs(p, lane), part_of(num_items, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x)));
}

}  // namespace deep_ep_ep
