// The sending half of a dispatch: each row is read once and stored straight to its last place at each receiver.
//
// Order: the stores of a block are complete (`bulk_wait`) before it adds to the receivers' arrival counters, at system
// scope. A receiver that has seen the count it expects has all rows.
#pragma once

#include <deep_ep_ep/row_stages.cuh>

namespace deep_ep_ep {

// Writes a token's side record into the stage. Called by all lanes; they must meet before it is stored.
__device__ __forceinline__ void write_side(const DispatchParams& p, const SideLayout& layout, unsigned* side, int token,
                                           int expert, int expert_row) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int pack = lane; pack < p.num_sf_packs; pack += 32)
        side[pack] = p.sf[token * p.sf_token_stride + pack * p.sf_pack_stride];
    if (lane < p.num_topk) {
        const long long entry = static_cast<long long>(token) * p.num_topk + lane;
        if (p.topk_weights != nullptr) side[layout.weights + lane] = __float_as_uint(p.topk_weights[entry]);
        side[layout.ids + lane] = static_cast<unsigned>(expert);
        if (p.do_expand) side[layout.rows + lane] = static_cast<unsigned>(expert_row);
    }
    if (lane == 0) side[layout.token] = static_cast<unsigned>(token);
    ptx::fence_proxy_async_shared();
}

// Sends the tokens from `begin` to `end`. Called by all threads of the block. `num_sent` [num_ranks], in shared memory
// and zero before, gets the rows that this block sent to each rank.
template <class Index>
__device__ __forceinline__ void send_rows(const DispatchParams& p, const PeerOpenings& peers, RowStage& stage,
                                          int begin, int end, int* num_sent) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (warp >= p.num_stages) return;
    const int num_local_experts = p.num_experts / p.team.num_ranks;
    const int num_pieces = (p.row_bytes + p.piece_bytes - 1) / p.piece_bytes;
    const SideLayout layout = side_layout(p);
    const ptx::CachePolicy once = ptx::evict_first_policy();
    // What peers read before, they read by plain loads.
    ptx::fence_proxy_async_global();
    const int num_items = (end - begin) * num_pieces;
    for (int item = warp; item < num_items; item += p.num_stages) {
        const int token = begin + item / num_pieces, piece = item % num_pieces;
        const int offset = piece * p.piece_bytes, num_bytes = min(p.piece_bytes, p.row_bytes - offset);
        free_stage();
        begin_load(stage, static_cast<const unsigned char*>(p.x) + static_cast<long long>(token) * p.row_bytes + offset,
                   num_bytes, once);
        int expert = -1, row = -1, expert_row = -1, rank = -1;
        if (lane < p.num_topk) {
            const long long entry = static_cast<long long>(token) * p.num_topk + lane;
            expert = static_cast<int>(static_cast<const Index*>(p.topk_idx)[entry]);
            if (expert >= 0) rank = expert / num_local_experts;
            row = p.row_of_entry[entry];
            if (p.do_expand) expert_row = p.expert_row_of_entry[entry];
        }
        if (piece == 0) write_side(p, layout, stage.side, token, expert, expert_row);
        __syncwarp();
        if (!end_load(p, stage)) return;
        if (rank >= 0) {
            const unsigned long long x_offset = peers.told[rank][0], side_told = peers.told[rank][1];
            unsigned char* window = comm::window_pointer<unsigned char>(p.team, rank, 0);
            int last_row = row;
            if ((side_told & kByExpert) != 0) last_row = row >= 0 || p.fans_out_at_sender ? expert_row : -1;
            if (last_row >= 0)
                ptx::bulk_store(window + x_offset + static_cast<unsigned long long>(last_row) * p.row_bytes + offset,
                                stage.piece, num_bytes);
            if (row >= 0 && piece == 0) {
                ptx::bulk_store(window + (side_told & ~kByExpert) + static_cast<unsigned long long>(row) * p.side_bytes,
                                stage.side, p.side_bytes);
                atomicAdd(&num_sent[rank], 1);
            }
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
