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

// Fills the masks of the tile that begins at `first`, for tokens below `end`. Called by all threads of the block.
// Raises `*invalid_token` (in shared memory) to 1 + a token that names an unknown expert, or one twice; such entries
// count for nothing.
template <class Index>
__device__ __forceinline__ void fill_masks(const DispatchParams& p, unsigned* masks, int first, int end,
                                           unsigned* invalid_token) {
    const int num_masks = kNumWarps * num_columns(p);
    for (int i = static_cast<int>(threadIdx.x); i < num_masks; i += kNumThreads) masks[i] = 0;
    __syncthreads();
    const int token = first + static_cast<int>(threadIdx.x);
    if (token < end) {
        unsigned* own = masks + threadIdx.x / 32 * num_columns(p);
        const unsigned bit = 1u << threadIdx.x % 32;
        const int num_local_experts = p.num_experts / p.team.num_ranks;
        bool is_valid = true;
        for (int k = 0; k < p.num_topk; ++k) {
            const int expert = expert_of_entry<Index>(p, token, k);
            if (expert < 0) continue;
            if (expert == p.num_experts) {
                is_valid = false;
                continue;
            }
            is_valid &= (atomicOr(&own[p.team.num_ranks + expert], bit) & bit) == 0;
            atomicOr(&own[expert / num_local_experts], bit);
        }
        if (!is_valid) atomicMax(invalid_token, static_cast<unsigned>(token) + 1);
    }
    __syncthreads();
}

// Tokens of the tile that select a column.
__device__ __forceinline__ unsigned count_column(const unsigned* masks, int num_columns, int column) {
    unsigned count = 0;
#pragma unroll
    for (int warp = 0; warp < kNumWarps; ++warp) count += __popc(masks[warp * num_columns + column]);
    return count;
}

// For each warp and column, the tokens of earlier warps of the tile that select the column. Called by all threads;
// a barrier of the block must follow.
__device__ __forceinline__ void sum_masks(const unsigned* masks, unsigned short* before, int num_columns) {
    for (int column = static_cast<int>(threadIdx.x); column < num_columns; column += kNumThreads) {
        unsigned count = 0;
#pragma unroll
        for (int warp = 0; warp < kNumWarps; ++warp) {
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
