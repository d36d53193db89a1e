// Adds up the counts of tiles: each becomes that of the tiles before it, and the sums go into this rank's slot, behind
// the opening that will be sent.
#pragma once

#include <deep_ep_ep/network/tile_masks.cuh>

namespace deep_ep_ep {

// The kernel's body, one thread a column.
//
// The slot may be written before the operation opens: that of two epochs ago has been received by all ranks, since all
// have opened the last one.
__device__ __forceinline__ void sum_tiles(const NetworkDispatchParams& p) {
    constexpr int kBatch = 8;  // so that their loads wait together
    const int columns = num_network_columns(p), tiles = num_tiles(p);
    const int column = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= columns) return;
    unsigned sum = 0;
    for (int first = 0; first < tiles; first += kBatch) {
        unsigned counts[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            counts[i] = first + i < tiles ? p.tile_counts[static_cast<long long>(first + i) * columns + column] : 0;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (first + i < tiles) p.tile_counts[static_cast<long long>(first + i) * columns + column] = sum;
            sum += counts[i];
        }
    }
    counts_of(p.net, own_rank(p.net), p.net.state->epoch + 1)[column] = sum;
}

}  // namespace deep_ep_ep
