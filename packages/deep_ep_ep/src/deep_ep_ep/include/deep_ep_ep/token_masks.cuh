// Counting by masks: which tokens of a tile select which column, as bits, so that a token's place among those that
// select the same column is a population count. It keeps the order of the tokens without any sort.
//
// Columns are the ranks, then the experts. A tile is one token a thread; each warp has a row of masks of its own, one
// word a column, in which bit l stands for the token of lane l.
#pragma once

#include <deep_ep_ep/dispatch_params.cuh>

namespace deep_ep_ep {

template <class Index>
__device__ __forceinline__ int expert_of_entry(const DispatchParams& p, int token, int k) {
    const Index id = static_cast<const Index*>(p.topk_idx)[static_cast<long long>(token) * p.num_topk + k];
    if (id < 0) return -1;
    return id < p.num_experts ? static_cast<int>(id) : p.num_experts;
}

// Warps that have a token in a tile of so many tokens.
__device__ __forceinline__ int num_mask_warps(int num_tokens) { return (min(num_tokens, kTileTokens) + 31) / 32; }

// Entries of a token that a thread loads together.
inline constexpr int kEntryBatch = 8;

// The experts of up to kEntryBatch entries from `first` on: all loads are under way before the first is used.
template <class Index>
__device__ __forceinline__ void load_experts(const DispatchParams& p, int token, int first, int (&experts)[kEntryBatch]) {
#pragma unroll
    for (int i = 0; i < kEntryBatch; ++i)
        experts[i] = first + i < p.num_topk ? expert_of_entry<Index>(p, token, first + i) : -1;
}

// Fills the masks of the tile that begins at `first`, for tokens below `end`. Called by all threads of the block.
// Raises `*invalid_token` (in shared memory) to 1 + a token that names an unknown expert, or one twice; such entries
// count for nothing.
template <class Index>
__device__ __forceinline__ void fill_masks(const DispatchParams& p, unsigned* masks, int first, int end,
                                           unsigned* invalid_token) {
    const int num_masks = num_mask_warps(end - first) * num_columns(p);
    for (int i = static_cast<int>(threadIdx.x); i < num_masks; i += kNumThreads) masks[i] = 0;
    __syncthreads();
    const int token = first + static_cast<int>(threadIdx.x);
    if (token < end) {
        unsigned* own = masks + threadIdx.x / 32 * num_columns(p);
        const unsigned bit = 1u << threadIdx.x % 32;
        const int num_local_experts = p.num_experts / p.team.num_ranks;
        bool is_valid = true;
        for (int k = 0; k < p.num_topk; k += kEntryBatch) {
            int experts[kEntryBatch];
            load_experts<Index>(p, token, k, experts);
#pragma unroll
            for (int i = 0; i < kEntryBatch; ++i) {
                const int expert = experts[i];
                if (expert < 0) continue;
                if (expert == p.num_experts) {
                    is_valid = false;
                    continue;
                }
                is_valid &= (atomicOr(&own[p.team.num_ranks + expert], bit) & bit) == 0;
                atomicOr(&own[expert / num_local_experts], bit);
            }
        }
        if (!is_valid) atomicMax(invalid_token, static_cast<unsigned>(token) + 1);
    }
    __syncthreads();
}

// Tokens of the tile that select a column; `num_warps` of them have tokens.
__device__ __forceinline__ unsigned count_column(const unsigned* masks, int num_warps, int num_columns, int column) {
    unsigned count = 0;
    for (int warp = 0; warp < num_warps; ++warp) count += __popc(masks[warp * num_columns + column]);
    return count;
}

// For each warp and column, the tokens of earlier warps of the tile that select the column. Called by all threads;
// a barrier of the block must follow.
__device__ __forceinline__ void sum_masks(const unsigned* masks, unsigned short* before, int num_warps,
                                          int num_columns) {
    for (int column = static_cast<int>(threadIdx.x); column < num_columns; column += kNumThreads) {
        unsigned count = 0;
        for (int warp = 0; warp < num_warps; ++warp) {
            before[warp * num_columns + column] = static_cast<unsigned short>(count);
            count += __popc(masks[warp * num_columns + column]);
        }
    }
}

// Place of this thread's token among the tokens of the tile that select a column, which it does.
__device__ __forceinline__ int place_in_column(const unsigned* masks, const unsigned short* before, int num_columns,
                                               int column) {
    const int at = static_cast<int>(threadIdx.x) / 32 * num_columns + column;
    return before[at] + __popc(masks[at] & ((1u << threadIdx.x % 32) - 1));
}

}  // namespace deep_ep_ep
