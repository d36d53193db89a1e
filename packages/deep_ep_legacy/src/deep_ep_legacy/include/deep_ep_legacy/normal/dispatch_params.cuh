// What the two kernels of a dispatch are passed, and where a rank stages its tokens for its peers.
//
// N is the number of this rank's tokens, R that of ranks, K `num_topk`, C `num_channels`, M the rows of the results.
// Rows of x, also those of the results, begin at multiples of 16 bytes.
#pragma once

#include <deep_ep_legacy/normal/opening.cuh>

namespace deep_ep_legacy::normal {

struct DispatchConfig {
    bool is_idx64;  // topk_idx is int64, not int32
};

template <bool kIsIdx64>
struct IndexOf {
    using Type = long long;
};
template <>
struct IndexOf<false> {
    using Type = int;
};

// Mirrored in `deep_ep_legacy.device.normal_kernels`.
struct DispatchParams {
    Places places;
    Opening opening;

    const void* x;                             // [N] rows of row_bytes
    const unsigned* sf;                        // [N, num_sf_packs] of 4 bytes, of any strides
    const void* topk_idx;                      // [N, K]
    const float* topk_weights;                 // [N, K]
    const bool* is_token_in_rank;              // [N, R]
    const int* num_tokens_per_rank;            // [R], compared with the routing
    const int* num_tokens_per_expert;          // [num_experts]
    long long sf_token_stride, sf_pack_stride;  // in packs

    // The handle; read by a dispatch that repeats one, written by others.
    int* rank_prefix_matrix;                   // [R, R]
    int* channel_prefix_matrix;                // [R, C]
    int* recv_channel_prefix_matrix;           // [R, C]
    int* recv_src_idx;                         // [M]
    int* send_head;                            // [N, R]

    int* host_counts;                          // pinned: a stamp, the rows, [num_local_experts] aligned counts; or null

    // The results, if they are asked for.
    void* recv_x;                              // [M] rows
    unsigned* recv_sf;                         // [M, num_sf_packs]
    void* recv_topk_idx;                       // [M, K]
    float* recv_topk_weights;                  // [M, K]

    int host_stamp;                            // what the stamp is when the counts are there
    int num_tokens, num_topk, num_experts, num_channels, expert_alignment, num_recv;
    int row_bytes, num_sf_packs, side_bytes;
    int num_slots;                             // tokens that the stage has room for
    bool repeats;                              // the handle is that of an earlier dispatch
};

// The stage of a rank: for each rank the end of its list; then rows, and side records, of a token a slot; then for each
// rank a list of the tokens that go there, as a ring. `dispatch_slots` in `deep_ep_legacy.device.normal_kernels` knows
// its size.
class DispatchStage {
   public:
    static constexpr int kHeadBytes = 512;
    static_assert(kHeadBytes >= comm::kMaxLsaRanks * 4, "the ends of all lists stand at the head");

    __device__ __forceinline__ DispatchStage(const DispatchParams& p, int rank)
        : p_(p), begin_(comm::window_pointer<char>(p.places.team, rank, p.places.stage_offset)) {}

    // Tokens for a rank that were listed so far, in this round and before.
    __device__ __forceinline__ int* list_end(int dst) const { return reinterpret_cast<int*>(begin_) + dst; }

    __device__ __forceinline__ char* row(int slot) const {
        return begin_ + kHeadBytes + static_cast<long long>(slot) * p_.row_bytes;
    }

    __device__ __forceinline__ unsigned* side(int slot) const {
        return reinterpret_cast<unsigned*>(row(p_.num_slots) + static_cast<long long>(slot) * p_.side_bytes);
    }

    // Where the token stands that is the `position`th of those for a rank.
    __device__ __forceinline__ int* listed(int dst, int position) const {
        return reinterpret_cast<int*>(side(p_.num_slots)) + static_cast<long long>(dst) * p_.num_slots +
               position % p_.num_slots;
    }

   private:
    const DispatchParams& p_;
    char* begin_;
};

__device__ __forceinline__ int tokens_per_channel(int num_tokens, int num_channels) {
    return max((num_tokens + num_channels - 1) / num_channels, 1);
}

// Puts the rows of this rank's tokens from `first` on into its stage, as many as there are slots, and beside each its
// record: packs, ids, weights. Called by all threads of each block.
template <class Index>
__device__ __forceinline__ void stage_tokens(const DispatchParams& p, int first) {
    const DispatchStage stage(p, p.places.team.rank);
    const int num = min(p.num_slots, p.num_tokens - first), lane = static_cast<int>(threadIdx.x) % 32;
    for (int slot = warp_of_rank(); slot < num; slot += num_rank_warps()) {
        const long long token = first + slot;
        copy_row(stage.row(slot), static_cast<const char*>(p.x) + token * p.row_bytes, p.row_bytes);
        unsigned* side = stage.side(slot);
        for (int i = lane; i < p.num_sf_packs; i += 32)
            side[i] = p.sf[token * p.sf_token_stride + i * p.sf_pack_stride];
        if (lane < p.num_topk) {
            const long long id = static_cast<const Index*>(p.topk_idx)[token * p.num_topk + lane];
            const bool is_expert = id >= 0 && id < p.num_experts;
            side[p.num_sf_packs + lane] = is_expert ? static_cast<unsigned>(id) : ~0u;
            side[p.num_sf_packs + p.num_topk + lane] = __float_as_uint(p.topk_weights[token * p.num_topk + lane]);
        }
    }
}

}  // namespace deep_ep_legacy::normal
