// Counts the tokens of each tile that select each rank, expert and relay. The first kernel of a dispatch across nodes
// that makes a plan.
#pragma once

#include <deep_ep_ep/network/tile_masks.cuh>

namespace deep_ep_ep {

// The kernel's body, for blocks of `kPlanThreads` with a word of dynamic shared memory a column.
template <NetworkIndexConfig kConfig>
__device__ __forceinline__ void count_tokens_of_tiles(const NetworkDispatchParams& p) {
    extern __shared__ unsigned masks[];
    const int columns = num_network_columns(p);
    for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles(p); tile += static_cast<int>(gridDim.x)) {
        fill_tile<typename IndexOf<kConfig.is_idx64>::Type>(p, masks, tile);
        for (int column = static_cast<int>(threadIdx.x); column < columns; column += kPlanThreads)
            p.tile_counts[static_cast<long long>(tile) * columns + column] = __popc(masks[column]);
        __syncthreads();
    }
}

}  // namespace deep_ep_ep
