// Counting by masks: which tokens of a tile select which column, as bits, so that a token's place among those that
// select the same column is a population count. It keeps the order of the tokens without any sort.
//
// Columns are the ranks, then the experts. A tile is up to kTileTokens tokens, and each 32 of them have a row of masks:
// one word a column, in which a bit stands for a token. A thread takes an entry of a token at a time, so that a few
// tokens keep as many threads busy as they have entries.
#pragma once

#include <deep_ep_ep/dispatch_params.cuh>

namespace deep_ep_ep {

template <class Index>
__device__ __forceinline__ int expert_of_entry(const DispatchParams& p, int token, int k) {
    const Index id = static_cast<const Index*>(p.topk_idx)[static_cast<long long>(token) * p.num_topk + k];
    if (id < 0) return -1;
    return id < p.num_experts ? static_cast<int>(id) : p.num_experts;
}

// Rows of masks of a tile of so many tokens.
__device__ __forceinline__ int num_mask_rows(int num_tokens) { return (min(num_tokens, kTileTokens) + 31) / 32; }

// Fills the masks of the tile that begins at `first`, for tokens below `end`. Called by all threads of the block.
// Raises `*invalid_token` (in shared memory) to 1 + a token that names an unknown expert, or one twice; such entries
// count for nothing.
template <class Index>
__device__ __forceinline__ void fill_masks(const DispatchParams& p, unsigned* masks, int first, int end,
                                           unsigned* invalid_token) {
    const int columns = num_columns(p), num_tokens = min(end - first, kTileTokens);
    const int num_masks = num_mask_rows(num_tokens) * columns;
    for (int i = static_cast<int>(threadIdx.x); i < num_masks; i += kNumThreads) masks[i] = 0;
    __syncthreads();
    const int num_local_experts = p.num_experts / p.team.num_ranks;
    for (int i = static_cast<int>(threadIdx.x); i < num_tokens * p.num_topk; i += kNumThreads) {
        const int place = i / p.num_topk, token = first + place;
        const int expert = expert_of_entry<Index>(p, token, i - place * p.num_topk);
        if (expert < 0) continue;
        const unsigned bit = 1u << place % 32;
        unsigned* own = masks + place / 32 * columns;
        // An unknown expert has no column.
        const bool is_valid = expert < p.num_experts && (atomicOr(&own[p.team.num_ranks + expert], bit) & bit) == 0;
        if (is_valid)
            atomicOr(&own[expert / num_local_experts], bit);
        else
            atomicMax(invalid_token, static_cast<unsigned>(token) + 1);
    }
    __syncthreads();
}

// Tokens of the tile that select a column.
__device__ __forceinline__ unsigned count_column(const unsigned* masks, int num_rows, int num_columns, int column) {
    unsigned count = 0;
    for (int row = 0; row < num_rows; ++row) count += __popc(masks[row * num_columns + column]);
    return count;
}

// For each row of masks and column, the tokens of earlier rows that select the column. Called by all threads; a barrier
// of the block must follow.
__device__ __forceinline__ void sum_masks(const unsigned* masks, unsigned short* before, int num_rows,
                                          int num_columns) {
    for (int column = static_cast<int>(threadIdx.x); column < num_columns; column += kNumThreads) {
        unsigned count = 0;
        for (int row = 0; row < num_rows; ++row) {
            before[row * num_columns + column] = static_cast<unsigned short>(count);
            count += __popc(masks[row * num_columns + column]);
        }
    }
}

// Place of a token among those of the tile that select a column, which it does. `place` is its place in the tile.
__device__ __forceinline__ int place_in_column(const unsigned* masks, const unsigned short* before, int num_columns,
                                               int place, int column) {
    const int at = place / 32 * num_columns + column;
    return before[at] + __popc(masks[at] & ((1u << place % 32) - 1));
}

}  // namespace deep_ep_ep
