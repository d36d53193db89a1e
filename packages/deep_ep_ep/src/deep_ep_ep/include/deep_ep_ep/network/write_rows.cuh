// The last part of the plan: the rows of every token at its receivers, its place at its relays, and copies for the
// handle.
#pragma once

#include <deep_ep_ep/network/count_tokens.cuh>

namespace deep_ep_ep {

// What an entry of a token comes to.
template <class Index>
__device__ __forceinline__ void write_entry(const NetworkDispatchParams& p, const unsigned* masks, int tile, int token,
                                            int k) {
    const DispatchParams& local = p.local;
    const Network& net = p.net;
    const int num_local_experts = local.num_experts / net.num_ranks;
    const unsigned* before = p.tile_counts + static_cast<long long>(tile) * num_network_columns(p);
    const unsigned below = (1u << token % kPlanTileTokens) - 1;
    const auto place_in = [&](int column) { return static_cast<int>(before[column] + __popc(masks[column] & below)); };
    const long long entry = static_cast<long long>(token) * local.num_topk + k;
    const int expert = expert_of_entry<Index>(local, token, k);
    int row = -1, expert_row = -1, dst_slot = -1, relay_slot = -1;
    if (expert >= 0) {
        const int rank = expert / num_local_experts, relay = relay_of(net, rank);
        bool is_last_of_rank = true, is_last_of_relay = true;
        for (int later = k + 1; later < local.num_topk; ++later) {
            const int other = expert_of_entry<Index>(local, token, later);
            if (other < 0) continue;
            is_last_of_rank &= other / num_local_experts != rank;
            is_last_of_relay &= relay_of(net, other / num_local_experts) != relay;
        }
        if (is_last_of_rank) {
            const int place = place_in(rank);
            row = static_cast<int>(p.first_rows[rank]) + place;
            dst_slot = own_rank(net) * local.num_max_tokens + place;
        }
        if (is_last_of_relay) {
            relay_slot = place_in(first_relay_column(p) + relay);
            p.sent_tokens[relay_counts(p, kRelaySentBegin)[relay] + relay_slot] = token;
        }
        if (local.do_expand)
            expert_row = static_cast<int>(p.first_rows[net.num_ranks + expert]) + place_in(net.num_ranks + expert);
    }
    local.row_of_entry[entry] = row;
    p.slot_of_entry[entry] = relay_slot;
    if (local.do_expand) local.expert_row_of_entry[entry] = expert_row;
    local.dst_slot[entry] = dst_slot;
    if (local.topk_idx_copy != nullptr)
        static_cast<Index*>(local.topk_idx_copy)[entry] = static_cast<const Index*>(local.topk_idx)[entry];
}

// The kernel's body, launched like `count_tokens_of_tiles`.
template <NetworkIndexConfig kConfig>
__device__ __forceinline__ void write_rows_of_tiles(const NetworkDispatchParams& p) {
    extern __shared__ unsigned masks[];
    using Index = typename IndexOf<kConfig.is_idx64>::Type;
    if (comm::has_expired(p.net.wait)) return;
    for (int tile = static_cast<int>(blockIdx.x); tile < num_tiles(p); tile += static_cast<int>(gridDim.x)) {
        fill_tile<Index>(p, masks, tile);
        const int first = tile * kPlanTileTokens, num_tokens = min(p.local.num_tokens - first, kPlanTileTokens);
        for (int i = static_cast<int>(threadIdx.x); i < num_tokens * p.local.num_topk; i += kPlanThreads)
            write_entry<Index>(p, masks, tile, first + i / p.local.num_topk, i % p.local.num_topk);
        __syncthreads();
    }
}

}  // namespace deep_ep_ep
