// Which tokens of a tile of 32 select which column, as a word of bits a column: a token's place among those that select
// the same column is a population count. It keeps the order of the tokens without any sort.
#pragma once

#include <deep_ep_ep/network/dispatch_params.cuh>
#include <deep_ep_ep/token_masks.cuh>

namespace deep_ep_ep {

// Fills the masks [columns] of a tile. Called by all threads of the block. A token that names an unknown expert, or one
// twice, is noted in the state; such entries count for nothing.
template <class Index>
__device__ __forceinline__ void fill_tile(const NetworkDispatchParams& p, unsigned* masks, int tile) {
    const DispatchParams& local = p.local;
    const int columns = num_network_columns(p), first = tile * kPlanTileTokens;
    const int num_tokens = min(local.num_tokens - first, kPlanTileTokens);
    const int num_local_experts = local.num_experts / p.net.num_ranks;
    for (int i = static_cast<int>(threadIdx.x); i < columns; i += kPlanThreads) masks[i] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < num_tokens * local.num_topk; i += kPlanThreads) {
        const int place = i / local.num_topk;
        const int expert = expert_of_entry<Index>(local, first + place, i - place * local.num_topk);
        if (expert < 0) continue;
        const unsigned bit = 1u << place;
        if (expert >= local.num_experts || (atomicOr(&masks[p.net.num_ranks + expert], bit) & bit) != 0) {
            atomicMax(&p.net.state->invalid_token, static_cast<unsigned>(first + place) + 1);
            continue;
        }
        const int rank = expert / num_local_experts;
        atomicOr(&masks[rank], bit);
        atomicOr(&masks[first_relay_column(p) + relay_of(p.net, rank)], bit);
    }
    __syncthreads();
}

__device__ __forceinline__ int num_tiles(const NetworkDispatchParams& p) {
    return (p.local.num_tokens + kPlanTileTokens - 1) / kPlanTileTokens;
}

}  // namespace deep_ep_ep
