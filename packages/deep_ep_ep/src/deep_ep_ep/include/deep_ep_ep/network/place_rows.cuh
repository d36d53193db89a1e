// Hands on rows: those that other nodes have put here, and this rank's own for its node. Each goes to its last row at
// every rank that wants it, with its side record, and the receivers are told how many there are of each source.
//
// It also writes the forward table, by which a combine finds the rows again: for each record the source's token, then
// for each entry that is served here the row at its rank, or -1, and then whose it is (`owner_word`). A row is that by
// token, or that by expert where every entry is brought back by itself.
#pragma once

#include <deep_ep_ep/network/send_rows.cuh>

namespace deep_ep_ep {

// Of a table's entry: the rank's place in the node, and whether the entry is the last that it serves of its token.
__device__ __forceinline__ int owner_word(int lsa_rank, bool is_last) { return lsa_rank << 1 | (is_last ? 1 : 0); }

inline constexpr int kMaxTargets = 32;  // a token has no more entries

// What the threads of a block share.
struct PlaceShared {
    unsigned char* targets[kMoveThreads / 32][kMaxTargets];  // where a warp's row goes
    int num_placed[comm::kMaxLsaRanks];                      // rows of the source at hand, by receiver
    int has_come;
};

// Stores a row at several places. Called by all lanes of a warp.
__device__ __forceinline__ void spread_row(unsigned char* const* targets, int num_targets, const unsigned char* from,
                                           int num_bytes) {
    const int lane = static_cast<int>(threadIdx.x) % 32, num_vectors = num_bytes / 16;
    constexpr int kBatch = 4;
    for (int first = lane; first < num_vectors; first += kBatch * 32) {
        uint4 vectors[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i * 32 < num_vectors) vectors[i] = reinterpret_cast<const uint4*>(from)[first + i * 32];
        for (int target = 0; target < num_targets; ++target) {
            uint4* to = reinterpret_cast<uint4*>(targets[target]);
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (first + i * 32 < num_vectors) to[first + i * 32] = vectors[i];
        }
    }
}

// Hands on one record. Called by all lanes of a warp.
__device__ __forceinline__ void place_record(const NetworkDispatchParams& p, PlaceShared& shared, int from_relay,
                                             int slot, unsigned long long epoch) {
    const Network& net = p.net;
    const DispatchParams& local = p.local;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int num_local_experts = local.num_experts / net.num_ranks, num_topk = local.num_topk;
    const SideLayout layout = side_layout(local);
    const unsigned char* record = recv_record(p, from_relay, slot);
    const unsigned* side = reinterpret_cast<const unsigned*>(record + local.row_bytes);
    const int token = static_cast<int>(side[layout.token]);
    int rank = -1, row = -1, expert_row = -1;
    if (lane < num_topk) {
        const int expert = static_cast<int>(side[layout.ids + lane]);
        if (expert >= 0 && hands_on_to(net, from_relay, expert / num_local_experts)) {
            rank = expert / num_local_experts;
            row = static_cast<int>(side[local.side_bytes / 4 + lane]);
            if (local.do_expand) expert_row = static_cast<int>(side[layout.rows + lane]);
        }
    }
    const bool is_last = row >= 0;
    const int lsa_rank = rank - net.team.first_rank;
    // The last entry of a rank has its row by token.
    const unsigned same = __match_any_sync(0xffffffffu, rank);
    const int row_by_token = __shfl_sync(0xffffffffu, row, 31 - __clz(static_cast<int>(same)));
    const unsigned lasts = __ballot_sync(0xffffffffu, is_last);
    if (is_last) {
        const Opening& theirs = opening_of(net, rank, epoch);
        const int last_row = (theirs.told[1] & kByExpert) != 0 ? expert_row : row;
        shared.targets[warp][__popc(lasts & ((1u << lane) - 1))] = comm::window_pointer<unsigned char>(
            net.team, lsa_rank, theirs.told[0] + static_cast<long long>(last_row) * local.row_bytes);
        atomicAdd(&shared.num_placed[lsa_rank], 1);
    }
    __syncwarp();
    const unsigned char* from = from_relay == own_relay(net) ? static_cast<const unsigned char*>(local.x) +
                                                                   static_cast<long long>(token) * local.row_bytes
                                                             : record;
    spread_row(shared.targets[warp], __popc(lasts), from, local.row_bytes);
    __syncwarp();
    if (is_last)
        shared.targets[warp][__popc(lasts & ((1u << lane) - 1))] = comm::window_pointer<unsigned char>(
            net.team, lsa_rank,
            (opening_of(net, rank, epoch).told[1] & ~kByExpert) + static_cast<long long>(row) * local.side_bytes);
    __syncwarp();
    spread_row(shared.targets[warp], __popc(lasts), record + local.row_bytes, local.side_bytes);
    __syncwarp();
    if (p.forward_table == nullptr) return;
    int* forward = p.forward_table +
                   (static_cast<long long>(from_relay) * local.num_max_tokens + slot) * forward_table_words(num_topk);
    if (lane == 0) forward[0] = token;
    if (lane < num_topk) {
        const bool is_single = p.is_single_rounding;
        forward[1 + lane] = rank < 0 ? -1 : is_single ? expert_row : row_by_token;
        forward[1 + num_topk + lane] = rank < 0 ? 0 : owner_word(lsa_rank, is_single || is_last);
    }
}

// The kernel's body, for blocks of `kMoveThreads`.
//
// Order: the wait acquires what the signals vouch for; the counts at the receivers are raised, as releases, behind a
// barrier that stands behind the stores of all threads of the block.
__device__ __forceinline__ void place_rows_in_node(const NetworkDispatchCall& c) {
    const NetworkDispatchParams& p = c.call;
    const Network& net = p.net;
    __shared__ PlaceShared shared;
    if (comm::has_expired(net.wait)) return;
    const unsigned long long epoch = net.state->epoch;
    const int warp = static_cast<int>(threadIdx.x) / 32, num = num_relays(net);
    for (int i = static_cast<int>(threadIdx.x); i < net.team.num_ranks; i += kMoveThreads) shared.num_placed[i] = 0;
    // Its own rows are here at once; the others come meanwhile.
    for (int step = 0; step < num; ++step) {
        const int relay = (own_relay(net) + num - step) % num, source = relay_rank(net, relay);
        const int num_rows = relay_counts(p, kRelayComing)[relay];
        if (num_rows == 0) continue;
        if (threadIdx.x == 0) {
            const unsigned long long least =
                total_of(net, kWordRows, source) + static_cast<unsigned>(num_chunks(num_rows, p.chunk_rows));
            shared.has_come =
                relay == own_relay(net) || wait_for_puts(c.gin, net, kWordRows, source, least, kPhaseArrive);
        }
        __syncthreads();
        if (shared.has_come == 0) return;
        const int step_rows = static_cast<int>(gridDim.x) * (kMoveThreads / 32);
        for (int slot = static_cast<int>(blockIdx.x) + warp * static_cast<int>(gridDim.x); slot < num_rows;
             slot += step_rows)
            place_record(p, shared, relay, slot, epoch);
        __syncthreads();
        for (int i = static_cast<int>(threadIdx.x); i < net.team.num_ranks; i += kMoveThreads) {
            const int num_placed = shared.num_placed[i];
            shared.num_placed[i] = 0;
            if (num_placed > 0)
                comm::raise_flag(word_at(net, i, kWordArrived, source), static_cast<unsigned long long>(num_placed));
        }
        // Nobody counts the next source's rows, or overwrites `has_come`, before that.
        __syncthreads();
    }
}

}  // namespace deep_ep_ep
