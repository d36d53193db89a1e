// What the dispatch kernel is specialised by, and what it is passed. Mirrored in `deep_ep_ep.device.dispatch_kernel`.
#pragma once

#include <deep_ep_ep/opening.cuh>

namespace deep_ep_ep {

inline constexpr int kNumThreads = 512;
inline constexpr int kNumWarps = kNumThreads / 32;
// The last warps of a block move no rows: they see to what lies beside them.
inline constexpr int kNumSideWarps = 2;
inline constexpr int kNumRowWarps = kNumWarps - kNumSideWarps;
// Tokens that a block counts at a time: one a thread.
inline constexpr int kTileTokens = kNumThreads;

struct DispatchConfig {
    bool has_plan;     // counts rows and exchanges the counts; otherwise the plan of an earlier kernel is used
    bool has_place;    // sends rows, and waits for those that come
    bool has_receive;  // writes the results from what has come
    bool is_idx64;     // topk_idx is int64, not int32
};

// The type of topk_idx.
template <bool kIsIdx64>
struct IndexOf {
    using Type = long long;
};
template <>
struct IndexOf<false> {
    using Type = int;
};

struct DispatchParams {
    comm::LsaTeam team;
    comm::WaitParams wait;
    RankState* state;
    // In the windows: OpeningSlots; the counts, see `exchange_counts.cuh`; Arrivals.
    unsigned long long opening_offset, counts_offset, arrivals_offset;
    // Where this rank receives: told[0] is the offset of the region for x, told[1] that of the side records, and in its
    // lowest bit whether x is expected by expert (kByExpert) or by token.
    Opening opening;

    const void* x;                                 // [num_tokens] rows of row_bytes
    const unsigned* sf;                            // packs of 4 bytes, or null
    const void* topk_idx;                          // [num_tokens, num_topk]
    const float* topk_weights;                     // [num_tokens, num_topk], or null
    long long sf_token_stride, sf_pack_stride;     // in packs

    // The plan, in device memory.
    unsigned* block_counts;                        // [num_blocks, num_ranks + num_experts], of no use afterwards
    int* row_of_entry;                             // [num_tokens, num_topk] row at the receiver by token; master or -1
    int* expert_row_of_entry;                      // [num_tokens, num_topk] row there by expert or -1; null by token
    int* num_send_rows;                            // [num_ranks]
    int* recv_row_ends;                            // [num_ranks] inclusive prefix sum of received rows

    // More of the handle; each may be null.
    int* dst_slot;                                 // [num_tokens, num_topk]
    void* topk_idx_copy;                           // [num_tokens, num_topk]
    int* expert_ends;                              // [num_local_experts]
    int* num_expert_rows;                          // [num_local_experts]
    int* recv_stats;                               // [num_local_experts], added to
    int* host_counts;                              // pinned: a stamp, the rows, and [num_local_experts] aligned counts
    int* metadata;                                 // [num_recv, num_topk + 2]

    // The results; all but the first may be null.
    void* recv_x;                                  // where the rows are in the end, in the window or not
    unsigned* recv_sf;
    void* recv_topk_idx;                           // [num_recv, num_topk], by token
    float* recv_topk_weights;                      // [num_recv, num_topk] by token, [num_rows] by expert
    long long recv_sf_row_stride, recv_sf_pack_stride;

    int host_stamp;                                // what the stamp is when the counts are there
    int counts_capacity;                           // pairs of columns that the counts of a rank have room for
    int num_ranks;                                 // of the group; one team holds them all, but across nodes
    int num_tokens, num_topk, num_experts, num_max_tokens, expert_alignment;
    int row_bytes, num_sf_packs, side_bytes;
    int num_stages, piece_bytes;                   // rows on their way through shared memory, and bytes of each
    int stages_offset;                             // where the stages begin in shared memory; 0: where the plan was
    bool do_expand;                                // results by expert
    bool is_staged;                                // x arrives by token in the region, and is copied to recv_x
    bool do_zero_padding;
    bool fans_out_at_sender;                       // by expert: the sender writes every copy, not only the first
};

// Lowest bit of told[1].
inline constexpr unsigned long long kByExpert = 1;

__device__ __forceinline__ int num_columns(const DispatchParams& p) { return p.team.num_ranks + p.num_experts; }

// Threads that share some work, and which of them this one is.
struct Workers {
    int idx;
    int num;
};

// All threads of this rank's blocks.
__device__ __forceinline__ Workers all_threads() {
    return Workers{static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), static_cast<int>(gridDim.x * blockDim.x)};
}

// The threads of all side warps.
__device__ __forceinline__ Workers side_threads() {
    constexpr int kNumPerBlock = kNumSideWarps * 32;
    const int idx_in_block = static_cast<int>(threadIdx.x) - kNumRowWarps * 32;
    return Workers{static_cast<int>(blockIdx.x) * kNumPerBlock + idx_in_block,
                   static_cast<int>(gridDim.x) * kNumPerBlock};
}

// The tokens of this block, a range of consecutive ones.
__device__ __forceinline__ int first_token(const DispatchParams& p, unsigned block_idx) {
    return static_cast<int>(static_cast<long long>(p.num_tokens) * block_idx / gridDim.x);
}

__device__ __forceinline__ int align_up(int value, int alignment) {
    return (value + alignment - 1) / alignment * alignment;
}

// A token's record beside its row, as it travels: packs, weights, global expert ids, rows by expert, token. Every part
// but the last is there or not for all tokens of a call alike.
struct SideLayout {
    int weights, ids, rows, token;  // in words of 4 bytes; the packs are at 0
};

__device__ __forceinline__ SideLayout side_layout(const DispatchParams& p) {
    SideLayout layout;
    layout.weights = p.num_sf_packs;
    layout.ids = layout.weights + (p.topk_weights != nullptr ? p.num_topk : 0);
    layout.rows = layout.ids + p.num_topk;
    layout.token = layout.rows + (p.do_expand ? p.num_topk : 0);
    return layout;
}

}  // namespace deep_ep_ep
