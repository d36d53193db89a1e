// The sending half of a dispatch: each row is read once and stored straight to its last place at each receiver.
//
// Order: the stores of a block are complete (`bulk_wait`) before it adds to the receivers' arrival counters, at system
// scope. A receiver that has seen the count it expects has all rows.
#pragma once

#include <deep_ep_ep/row_stages.cuh>

namespace deep_ep_ep {

// A warp's share of the rows of a block: pieces of the tokens from `begin` to `end`.
struct RowItems {
    int begin;
    int num_pieces;
    int num_items;
};

__device__ __forceinline__ RowItems row_items(const DispatchParams& p, int begin, int end) {
    const int num_pieces = (p.row_bytes + p.piece_bytes - 1) / p.piece_bytes;
    return RowItems{begin, num_pieces, (end - begin) * num_pieces};
}

// Begins to load an item of this warp. Called by all lanes; the stage must be free.
__device__ __forceinline__ void begin_item(const DispatchParams& p, const RowItems& items, const RowStage& stage,
                                           int item, ptx::CachePolicy policy) {
    const int token = items.begin + item / items.num_pieces, offset = item % items.num_pieces * p.piece_bytes;
    const unsigned char* row = static_cast<const unsigned char*>(p.x) + static_cast<long long>(token) * p.row_bytes;
    begin_load(stage, row + offset, min(p.piece_bytes, p.row_bytes - offset), policy);
}

// Loads the first item of each warp, before anything is known of where it goes. Called by all threads of the block.
__device__ __forceinline__ void load_ahead(const DispatchParams& p, RowStage& stage, int begin, int end) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const RowItems items = row_items(p, begin, end);
    if (warp >= p.num_stages || warp >= items.num_items) return;
    begin_item(p, items, stage, warp, ptx::evict_first_policy());
    stage.is_loading = true;
}

// Sends the tokens from `begin` to `end`. Called by the row warps. `num_sent` [num_ranks], in shared memory and zero
// before, gets the rows that this block sent to each rank.
template <class Index>
__device__ __forceinline__ void send_rows(const DispatchParams& p, const PeerOpenings& peers, RowStage& stage,
                                          int begin, int end, int* num_sent) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (warp >= p.num_stages) return;
    const int num_local_experts = p.num_experts / p.team.num_ranks;
    const RowItems items = row_items(p, begin, end);
    const ptx::CachePolicy once = ptx::evict_first_policy();
    // What peers read before, they read by plain loads.
    ptx::fence_proxy_async_global();
    for (int item = warp; item < items.num_items; item += p.num_stages) {
        const int token = items.begin + item / items.num_pieces, piece = item % items.num_pieces;
        const int offset = piece * p.piece_bytes, num_bytes = min(p.piece_bytes, p.row_bytes - offset);
        if (!stage.is_loading) {
            free_stage();
            begin_item(p, items, stage, item, once);
        }
        stage.is_loading = false;
        int row = -1, expert_row = -1, rank = -1;
        if (lane < p.num_topk) {
            const long long entry = static_cast<long long>(token) * p.num_topk + lane;
            const int expert = static_cast<int>(static_cast<const Index*>(p.topk_idx)[entry]);
            if (expert >= 0) rank = expert / num_local_experts;
            row = p.row_of_entry[entry];
            if (p.do_expand) expert_row = p.expert_row_of_entry[entry];
        }
        if (!end_load(p, stage)) return;
        if (rank >= 0) {
            unsigned char* region = comm::window_pointer<unsigned char>(p.team, rank, peers.told[rank][0]);
            int last_row = row;
            if ((peers.told[rank][1] & kByExpert) != 0)
                last_row = row >= 0 || p.fans_out_at_sender ? expert_row : -1;
            if (last_row >= 0)
                ptx::bulk_store(region + static_cast<long long>(last_row) * p.row_bytes + offset, stage.piece,
                                num_bytes);
            if (row >= 0 && piece == 0) atomicAdd(&num_sent[rank], 1);
        }
        ptx::bulk_commit();
    }
    ptx::bulk_wait<0>();
}

// Tells the receivers how many rows this block has stored. Called by all threads of the block, behind `send_rows`.
__device__ __forceinline__ void announce_rows(const DispatchParams& p, const int* num_sent) {
    __syncthreads();
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += kNumThreads) {
        Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, peer, p.arrivals_offset);
        if (num_sent[peer] > 0)
            comm::raise_flag(&arrivals->num_arrived[p.team.rank], static_cast<unsigned long long>(num_sent[peer]));
    }
}

}  // namespace deep_ep_ep
