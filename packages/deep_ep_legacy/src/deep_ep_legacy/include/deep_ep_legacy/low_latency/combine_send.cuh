// The half of a combine that sends: each row goes back to the rank of its token.
#pragma once

#include <deep_ep_legacy/low_latency/combine_params.cuh>
#include <deep_ep_legacy/low_latency/row_list.cuh>

namespace deep_ep_legacy::low_latency {

// Encodes one chunk of a row into a slot, or copies it where it may not be encoded. Called by all lanes of a warp.
__device__ __forceinline__ void send_chunk(char* slot, const char* row, int hidden, int chunk, int lane) {
    constexpr int kMaxHalves = 2;
    const int num_halves = halves_of_chunk(hidden);
    const int chunk_offset = chunk * num_halves * kHalfBytes;
    LaneValues values[kMaxHalves];
    unsigned pairs[kMaxHalves];
    bool is_encoded = true;
#pragma unroll
    for (int half = 0; half < kMaxHalves; ++half) {
        if (half >= num_halves) continue;
        values[half] = load_values(row + chunk_offset + half * kHalfBytes + lane * (kLaneChannels * 2));
        pairs[half] = find_pair(values[half]);
        is_encoded = is_encoded && is_encodable(pairs[half]);
        if (lane % kLanesPerGroup == 0) {
            const int group = (chunk * num_halves + half) * (kHalfChannels / kGroupChannels) + lane / kLanesPerGroup;
            reinterpret_cast<unsigned*>(slot)[group] = pairs[half];
        }
    }
    is_encoded = __all_sync(kAllLanes, is_encoded) != 0;
    char* to = slot + pairs_bytes(hidden) + chunk_offset;
#pragma unroll
    for (int half = 0; half < kMaxHalves; ++half) {
        if (half >= num_halves) continue;
        if (is_encoded)
            encode_half(to + half * kEncodedHalfBytes, values[half], pairs[half], lane);
        else
            store_values(to + half * kHalfBytes + lane * (kLaneChannels * 2), values[half]);
    }
}

// Sends all rows back, then tells that they are there. Called by all threads of each block. The order is that of
// `send_rows` in dispatch.
//
// firsts: shared memory for one integer more than there are experts.
template <bool kIsLogfmt>
__device__ __forceinline__ void return_rows(const CombineParams& p, unsigned long long epoch, Members& members,
                                            int* firsts) {
    const int num_ranks = p.call.team.num_ranks, num_local = num_local_experts(p.call), num_runs = p.call.num_experts;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int hidden = p.call.hidden, num_max_tokens = p.call.num_max_tokens;
    const long long rows_per_expert = static_cast<long long>(num_ranks) * num_max_tokens;
    find_members(p.call, members);
    __syncthreads();
    wait_for_free_slabs(p.call, epoch, members);
    // Runs are blocks of the layout: those of one expert behind each other, by source rank.
    for (int run = static_cast<int>(threadIdx.x); run < num_runs; run += kNumThreads)
        firsts[run] = members.is_active[run % num_ranks]
                          ? min(static_cast<int>(p.layout_range[run] & 0xffffffffll), num_max_tokens)
                          : 0;
    __syncthreads();
    number_runs(firsts, num_runs);
    const int piece_bytes = kIsLogfmt ? halves_of_chunk(hidden) * kHalfBytes : kPieceBytes;
    const int num_pieces = (hidden * 2 + piece_bytes - 1) / piece_bytes;
    const long long num_tasks = static_cast<long long>(firsts[num_runs]) * num_pieces;
    for (long long task = static_cast<long long>(blockIdx.x) * kNumWarps + warp; task < num_tasks;
         task += static_cast<long long>(gridDim.x) * kNumWarps) {
        const int number = static_cast<int>(task / num_pieces), piece = static_cast<int>(task % num_pieces);
        const int run = run_of(firsts, num_runs, number);
        const int local = run / num_ranks, rank = run % num_ranks;
        const long long row = local * rows_per_expert + (p.layout_range[run] >> 32) + (number - firsts[run]);
        const int token = p.src_info[row];
        if (token < 0 || token >= num_max_tokens) continue;
        char* slot = returned_slot<kIsLogfmt>(p.call, slab_of(p.call, rank, epoch),
                                              p.call.team.rank * num_local + local, token);
        const char* from = static_cast<const char*>(p.x) + row * (hidden * 2ll);
        if constexpr (kIsLogfmt) {
            send_chunk(slot, from, hidden, piece, lane);
        } else {
            const int offset = piece * kPieceBytes;
            copy_piece(slot + offset, from + offset, min(kPieceBytes, hidden * 2 - offset), lane);
        }
    }
    if (!is_last_block(&p.call.state->num_done_sending)) return;
    for (int rank = static_cast<int>(threadIdx.x); rank < num_ranks; rank += kNumThreads)
        if (may_tell(p.call, members, rank))
            ptx::st_release<ptx::Scope::kSys>(&signals_of(p.call, rank)->flags[epoch % 2][p.call.team.rank],
                                              make_word(p.call, epoch, 0));
    count_sent(p.call, members, epoch);
}

}  // namespace deep_ep_legacy::low_latency
