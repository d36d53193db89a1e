// The half of combine in which a rank sums up what its tokens became: rows that it reads from the windows of the ranks
// that keep theirs, and rows and weights that the others have put into its slab.
#pragma once

#include <deep_ep_ep/combine_params.cuh>

namespace deep_ep_ep {

// The rank that hosts the expert of an entry, or -1.
template <bool kHasWideIdx>
class EntryRanks {
   public:
    __device__ __forceinline__ explicit EntryRanks(const CombineParams& p)
        : topk_idx_(p.topk_idx), num_local_experts_(p.num_experts / p.team.num_ranks) {}

    __device__ __forceinline__ int load_expert(long long entry) const {
        if constexpr (kHasWideIdx)
            return static_cast<int>(static_cast<const long long*>(topk_idx_)[entry]);
        else
            return static_cast<const int*>(topk_idx_)[entry];
    }

    __device__ __forceinline__ int rank_of(int expert) const { return expert < 0 ? -1 : expert / num_local_experts_; }

   private:
    const void* topk_idx_;
    int num_local_experts_;
};

// For each token: the sum of the biases and of the rows that stand for its entries, in the documented order.
template <bool kHasWideIdx>
class SumJobs {
   public:
    // Of the entry that this lane stands for.
    struct Entry {
        int expert;
        int row;  // in the x of its rank, if that is in its window
    };

    __device__ __forceinline__ SumJobs(const CombineParams& p, CombineShared& shared, int lane)
        : p_(p), shared_(shared), ranks_(p), lane_(lane) {}

    __device__ __forceinline__ Entry load(int token) const {
        if (lane_ >= p_.num_topk) return Entry{-1, -1};
        const long long entry = static_cast<long long>(token) * p_.num_topk + lane_;
        return Entry{ranks_.load_expert(entry), (p_.do_expand ? p_.expert_row_of_entry : p_.row_of_entry)[entry]};
    }

    __device__ __forceinline__ RowJob make(const Entry& entry, int token, RowLists& lists, bool is_first) const {
        const int rank = ranks_.rank_of(entry.expert);
        // Entries that are added up first, if any are: those of one rank, which count at the place of the last of them.
        unsigned group = __match_any_sync(kAllLanes, rank);
        int last = 31 - __clz(static_cast<int>(group));
        const bool is_last_of_rank = rank >= 0 && lane_ == last;
        const bool is_pulled = rank >= 0 && !is_pusher(shared_.peers, rank);
        if (is_first && is_last_of_rank && is_pulled) atomicAdd(&shared_.num_pulled[rank], 1);
        if (p_.is_single_rounding) {
            group = 1u << lane_;
            last = lane_;
        }
        // One row stands for a group, except where this rank has to add up the expert-major rows of another.
        const bool has_row = rank >= 0 && (lane_ == last || (is_pulled && p_.do_expand));
        const unsigned have_rows = __ballot_sync(kAllLanes, has_row);
        const unsigned own_rows = group & have_rows;
        const int num_own_rows = __popc(own_rows);
        // Rows of the groups whose last entry comes before that of this lane's group.
        int num_before = rank >= 0 && lane_ == last ? num_own_rows : 0;
        const int num_last = num_before;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int num = __shfl_up_sync(kAllLanes, num_before, distance);
            if (lane_ >= distance) num_before += num;
        }
        num_before = __shfl_sync(kAllLanes, num_before - num_last, last);
        const int position = num_before + __popc(own_rows & ((1u << lane_) - 1));
        const bool is_in_group = has_row && num_own_rows > 1;
        const unsigned bit = is_in_group ? 1u << position : 0;
        const unsigned in_group = __reduce_or_sync(kAllLanes, bit);
        const unsigned ends_group = __reduce_or_sync(kAllLanes, lane_ == last ? bit : 0);

        const long long offset = static_cast<long long>(token) * p_.row_bytes;
        int num_biases = 0;
#pragma unroll
        for (int i = 0; i < kMaxBiases; ++i) {
            if (p_.biases[i] == nullptr) continue;
            if (lane_ == 0) lists.rows[num_biases] = static_cast<const char*>(p_.biases[i]) + offset;
            ++num_biases;
        }
        if (has_row) {
            const char* row;
            if (is_pulled)
                row = comm::window_pointer<char>(
                    p_.team, rank, shared_.peers.told[rank][0] + static_cast<long long>(entry.row) * p_.row_bytes);
            else
                row = Slab(p_, p_.team.rank, p_.opening.told[1])
                          .row(Slab::has_layer_of_rank(p_) ? rank : lane_, token);
            lists.rows[num_biases + position] = row;
        }
        if (lane_ == 0) lists.outs[0] = static_cast<char*>(p_.out) + offset;
        RowJob job;
        job.num_rows = num_biases + __popc(have_rows);
        job.in_group = static_cast<unsigned long long>(in_group) << num_biases;
        job.ends_group = static_cast<unsigned long long>(ends_group) << num_biases;
        return job;
    }

   private:
    const CombineParams& p_;
    CombineShared& shared_;
    EntryRanks<kHasWideIdx> ranks_;
    int lane_;
};

// Waits until all rows that peers push have come: of the peers that push x, or of all, which have pushed weights.
// Called by all threads of a block; false in all of them if some did not come in time.
[[nodiscard]] __device__ __forceinline__ bool wait_for_pushed(const CombineParams& p, const PeerOpenings& peers,
                                                              bool are_all_awaited) {
    bool have_come = true;
    const Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, p.team.rank, p.arrivals_offset);
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += static_cast<int>(blockDim.x)) {
        if (!are_all_awaited && !is_pusher(peers, peer)) continue;
        const unsigned long long num_expected =
            p.state->num_pushed[peer] + static_cast<unsigned long long>(p.num_send_rows[peer]);
        if (!comm::wait_flag(&arrivals->num_pushed[peer], num_expected, p.wait, kPhasePush,
                             comm::group_rank(p.team, peer)))
            have_come = false;
    }
    return __syncthreads_and(have_come) != 0;
}

// Writes the weights of some tokens: of each entry what the rank of its expert has pushed, 0 where there is none.
// Called by all threads of a block, behind the wait for all that is pushed.
template <bool kHasWideIdx>
__device__ __forceinline__ void gather_weights(const CombineParams& p, const Part& tokens) {
    const EntryRanks<kHasWideIdx> ranks(p);
    const Slab slab(p, p.team.rank, p.opening.told[1]);
    const long long end = tokens.end * p.num_topk;
    for (long long entry = tokens.begin * p.num_topk + threadIdx.x; entry < end; entry += blockDim.x) {
        const int token = static_cast<int>(entry / p.num_topk);
        const int k = static_cast<int>(entry - static_cast<long long>(token) * p.num_topk);
        const int rank = ranks.rank_of(ranks.load_expert(entry));
        float weight = 0;
        if (rank >= 0) {
            int layer = rank;
            if (!Slab::has_layer_of_rank(p)) {
                layer = k;
                for (int later = k + 1; later < p.num_topk; ++later)
                    if (ranks.rank_of(ranks.load_expert(entry - k + later)) == rank) layer = later;
            }
            weight = slab.weights(layer, token)[k];
        }
        p.out_weights[entry] = weight;
    }
}

// Sums up this block's tokens, and tells each rank whose window it read with how many of them it is done. Called by
// all threads of each block, behind the opening and behind `push`. False, in all threads of the block, if something did
// not come in time.
//
// Order: what peers wrote into their windows before they opened, and into this rank's slab before they raised their
// counts, has been acquired; what is read by bulk copies is complete when the block releases its own counts.
template <RowType kType, bool kHasWideIdx>
[[nodiscard]] __device__ __forceinline__ bool pull(const CombineParams& p, CombineShared& shared,
                                                   RowStream<kType>& stream, int lane) {
    const Part tokens = part_of(p.num_tokens, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    if (!wait_for_pushed(p, shared.peers, false)) return false;
    // Peers wrote by plain stores what bulk copies will read.
    ptx::fence_proxy_async_global();
    const bool is_right = stream.run(SumJobs<kHasWideIdx>(p, shared, lane), tokens);
    if (__syncthreads_and(is_right) == 0) return false;
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += static_cast<int>(blockDim.x)) {
        const int num_rows = shared.num_pulled[peer];
        Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, peer, p.arrivals_offset);
        if (num_rows > 0)
            comm::raise_flag(&arrivals->num_pulled[p.team.rank], static_cast<unsigned long long>(num_rows));
    }
    if (p.has_weights) {
        if (!wait_for_pushed(p, shared.peers, true)) return false;
        gather_weights<kHasWideIdx>(p, tokens);
    }
    return true;
}

}  // namespace deep_ep_ep
