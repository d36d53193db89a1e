// What lies beside rows (ids, weights, scales, rows by expert) on its way: small records, by the warps that move no
// rows.
//
// They travel while the rows do, and a receiver writes them into the results while rows still come. Behind the rows
// they would wait for memory that is busy with writing these: measured, 30 to 60 us at the end of a small dispatch.
#pragma once

#include <deep_ep_core/ptx/named_barrier.cuh>
#include <deep_ep_ep/receive_rows.cuh>

namespace deep_ep_ep {

inline constexpr int kSideBarrier = 1;
inline constexpr int kNumSideThreads = kNumSideWarps * 32;
// Words of a record: 224 packs (one for 32 channels of a row of 7168), 3 * 32 for the routing, and the token; longer
// ones travel in parts.
inline constexpr int kSideWords = 128;

// What the side warps of a block share.
struct SideMemory {
    alignas(16) unsigned words[kNumSideWarps][kSideWords];  // a part of a record
    int num_sent[comm::kMaxLsaRanks];
    int have_come;
};

// Called by all threads of the block at first; a barrier of the block must follow.
__device__ __forceinline__ void init_sides(SideMemory& memory) {
    for (int i = static_cast<int>(threadIdx.x); i < comm::kMaxLsaRanks; i += kNumThreads) memory.num_sent[i] = 0;
    if (threadIdx.x == 0) memory.have_come = 1;
}

// A word of the record of a token.
__device__ __forceinline__ unsigned side_word(const DispatchParams& p, const SideLayout& layout, int token, int word) {
    if (word < layout.weights) return p.sf[token * p.sf_token_stride + word * p.sf_pack_stride];
    const long long first = static_cast<long long>(token) * p.num_topk;
    if (word < layout.ids) return __float_as_uint(p.topk_weights[first + word - layout.weights]);
    if (word < layout.rows) return 0;  // the caller knows the ids
    if (word < layout.token) return static_cast<unsigned>(p.expert_row_of_entry[first + word - layout.rows]);
    return static_cast<unsigned>(token);
}

// Sends the records of the tokens from `begin` to `end`, and tells the receivers how many. Called by all lanes of the
// side warps.
template <class Index>
__device__ __forceinline__ void send_sides(const DispatchParams& p, const PeerOpenings& peers, SideMemory& memory,
                                           int begin, int end) {
    const int side_warp = static_cast<int>(threadIdx.x) / 32 - kNumRowWarps, lane = static_cast<int>(threadIdx.x) % 32;
    const int num_local_experts = p.num_experts / p.team.num_ranks;
    const SideLayout layout = side_layout(p);
    const int num_words = p.side_bytes / 4;
    unsigned* words = memory.words[side_warp];
    for (int token = begin + side_warp; token < end; token += kNumSideWarps) {
        int expert = -1, row = -1, rank = -1;
        if (lane < p.num_topk) {
            const long long entry = static_cast<long long>(token) * p.num_topk + lane;
            expert = static_cast<int>(static_cast<const Index*>(p.topk_idx)[entry]);
            row = p.row_of_entry[entry];
            if (row >= 0) rank = expert / num_local_experts;
        }
        const unsigned masters = __ballot_sync(0xffffffffu, row >= 0);
        if (row >= 0) atomicAdd(&memory.num_sent[rank], 1);
        for (int first = 0; first < num_words; first += kSideWords) {
            const int num_part = min(kSideWords, num_words - first);
            for (int word = first + lane; word < first + num_part; word += 32)
                if (word < layout.ids || word >= layout.rows)
                    words[word - first] = word <= layout.token ? side_word(p, layout, token, word) : 0;
            const int id_word = layout.ids + lane - first;
            if (lane < p.num_topk && 0 <= id_word && id_word < num_part) words[id_word] = static_cast<unsigned>(expert);
            __syncwarp();
            // A part is at most 32 vectors: one a lane.
            const bool has_vector = lane < num_part / 4;
            const uint4 vector = has_vector ? reinterpret_cast<const uint4*>(words)[lane] : uint4{0, 0, 0, 0};
            for (unsigned rest = masters; rest != 0; rest &= rest - 1) {
                const int source_lane = __ffs(static_cast<int>(rest)) - 1;
                const int to_rank = __shfl_sync(0xffffffffu, rank, source_lane);
                const int to_row = __shfl_sync(0xffffffffu, row, source_lane);
                unsigned char* sides =
                    comm::window_pointer<unsigned char>(p.team, to_rank, peers.told[to_rank][1] & ~kByExpert);
                unsigned char* to = sides + static_cast<long long>(to_row) * p.side_bytes + first * 4;
                if (has_vector) reinterpret_cast<uint4*>(to)[lane] = vector;
            }
            __syncwarp();
        }
    }
    ptx::named_barrier_sync(kSideBarrier, kNumSideThreads);
    const int thread_idx = static_cast<int>(threadIdx.x) - kNumRowWarps * 32;
    for (int peer = thread_idx; peer < p.team.num_ranks; peer += kNumSideThreads) {
        Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, peer, p.arrivals_offset);
        if (memory.num_sent[peer] > 0)
            comm::raise_flag(&arrivals->num_sides[p.team.rank],
                             static_cast<unsigned long long>(memory.num_sent[peer]));
    }
}

// Waits until all side records of this operation have come. Called by all lanes of the side warps; the same answer in
// all of them.
[[nodiscard]] __device__ __forceinline__ bool wait_for_sides(const DispatchParams& p, SideMemory& memory,
                                                             const int* row_ends) {
    const Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, p.team.rank, p.arrivals_offset);
    const int thread_idx = static_cast<int>(threadIdx.x) - kNumRowWarps * 32;
    for (int peer = thread_idx; peer < p.team.num_ranks; peer += kNumSideThreads) {
        const unsigned long long count = row_ends[peer] - (peer > 0 ? row_ends[peer - 1] : 0);
        if (!comm::wait_flag(&arrivals->num_sides[peer], p.state->num_sides[peer] + count, p.wait, kPhaseArrive,
                             comm::group_rank(p.team, peer)))
            memory.have_come = 0;
    }
    ptx::named_barrier_sync(kSideBarrier, kNumSideThreads);
    return memory.have_come != 0;
}

}  // namespace deep_ep_ep
