// The half of a dispatch that sends: each row is read once, cast if asked, and stored into a slot of each of its
// experts' ranks.
#pragma once

#include <deep_ep_legacy/low_latency/dispatch_params.cuh>
#include <deep_ep_legacy/low_latency/fp8.cuh>

namespace deep_ep_legacy::low_latency {

// Entries of topk_idx whose slots a block finds at a time. A token may have no more.
inline constexpr int kRoundEntries = 512;
inline constexpr int kRowPieceChannels = 32 * kChannelsPerLane;

// Of each block, in shared memory.
struct SendRound {
    int experts[kRoundEntries];  // -1: none
    char* slots[kRoundEntries];  // null: not sent
};

template <bool kIsIdx64>
__device__ __forceinline__ int load_expert(const DispatchParams& p, long long entry) {
    long long expert;
    if constexpr (kIsIdx64)
        expert = static_cast<const long long*>(p.topk_idx)[entry];
    else
        expert = static_cast<const int*>(p.topk_idx)[entry];
    return expert < 0 || expert >= p.call.num_experts ? -1 : static_cast<int>(expert);
}

// Whether an entry is neither an expert nor -1.
template <bool kIsIdx64>
__device__ __forceinline__ bool is_invalid(const DispatchParams& p, long long entry) {
    long long expert;
    if constexpr (kIsIdx64)
        expert = static_cast<const long long*>(p.topk_idx)[entry];
    else
        expert = static_cast<const int*>(p.topk_idx)[entry];
    return expert < -1 || expert >= p.call.num_experts;
}

// Counts the selections of each expert: of all tokens, and of those before a token. Called by all threads of a block;
// ends with a barrier. Both tables have a place for each expert.
//
// The rows of an expert are numbered by token, so its first slot for a block is how many come before.
template <bool kIsIdx64>
__device__ __forceinline__ void count_selections(const DispatchParams& p, int first_token, int* totals, int* before) {
    for (int expert = static_cast<int>(threadIdx.x); expert < p.call.num_experts; expert += kNumThreads)
        totals[expert] = before[expert] = 0;
    __syncthreads();
    const long long num_entries = static_cast<long long>(p.num_tokens) * p.num_topk;
    const long long first_entry = static_cast<long long>(first_token) * p.num_topk;
    for (long long entry = threadIdx.x; entry < num_entries; entry += kNumThreads) {
        const int expert = load_expert<kIsIdx64>(p, entry);
        if (expert < 0) {
            if (blockIdx.x == 0 && is_invalid<kIsIdx64>(p, entry))
                comm::report_timeout(p.call.notes, kNoteInvalid, p.call.wait.rank, 0, entry / p.num_topk, 0);
            continue;
        }
        atomicAdd(totals + expert, 1);
        if (entry < first_entry) atomicAdd(before + expert, 1);
    }
    __syncthreads();
}

// Finds the slots of some tokens' entries, and counts them into `before`. Called by all threads of a block; begins and
// ends with a barrier.
template <bool kIsFp8, bool kIsIdx64>
__device__ __forceinline__ void find_slots(const DispatchParams& p, const Members& members, unsigned long long epoch,
                                           int first_token, int num_tokens, int* before, SendRound& round) {
    const int num_entries = num_tokens * p.num_topk, entry = static_cast<int>(threadIdx.x);
    const long long first_entry = static_cast<long long>(first_token) * p.num_topk;
    __syncthreads();
    if (entry < num_entries) round.experts[entry] = load_expert<kIsIdx64>(p, first_entry + entry);
    __syncthreads();
    int expert = -1;
    if (entry < num_entries) {
        expert = round.experts[entry];
        char* place = nullptr;
        if (expert >= 0) {
            int slot = before[expert];
            for (int other = 0; other < entry; ++other) slot += round.experts[other] == expert;
            const int num_local = num_local_experts(p.call);
            const int rank = expert / num_local, local = expert % num_local;
            // More than T rows for one expert: it stands in one token more than once.
            if (members.is_active[rank] && slot < p.call.num_max_tokens) {
                const long long first_slot =
                    static_cast<long long>(local * p.call.team.num_ranks + p.call.team.rank) * p.call.num_max_tokens;
                place = slab_of(p.call, rank, epoch) + (first_slot + slot) * slot_bytes<kIsFp8>(p.call.hidden);
            }
        }
        round.slots[entry] = place;
    }
    __syncthreads();
    if (expert >= 0) atomicAdd(before + expert, 1);
}

// Sends 512 channels of a token. Called by all lanes of a warp.
template <bool kIsFp8>
__device__ __forceinline__ void send_piece(const DispatchParams& p, int token, int piece, char* const* slots,
                                           int lane) {
    const int hidden = p.call.hidden;
    const char* row = static_cast<const char*>(p.x) + static_cast<long long>(token) * hidden * 2;
    if (piece == 0) {
        const int token_offset = slot_bytes<kIsFp8>(hidden) - 16;
        for (int k = lane; k < p.num_topk; k += 32)
            if (slots[k] != nullptr) *reinterpret_cast<int*>(slots[k] + token_offset) = token;
    }
    if constexpr (kIsFp8) {
        const int channel = piece * kRowPieceChannels + lane * kChannelsPerLane;
        const bool is_inside = channel < hidden;
        uint4 values[2] = {};
        if (is_inside) {
            const uint4* from = reinterpret_cast<const uint4*>(row + channel * 2);
            values[0] = __ldg(from);
            values[1] = __ldg(from + 1);
        }
        float scale;
        const uint4 cast = cast_channels(values, p.is_rounded, scale);
        if (!is_inside) return;
        const int scale_offset = hidden + channel / kChannelsPerScale * 4;
        for (int k = 0; k < p.num_topk; ++k) {
            char* slot = slots[k];
            if (slot == nullptr) continue;
            *reinterpret_cast<uint4*>(slot + channel) = cast;
            if (lane % kLanesPerScale == 0) *reinterpret_cast<float*>(slot + scale_offset) = scale;
        }
    } else {
        // Two vectors a lane, each a whole line of the warp.
        const int offset = piece * kRowPieceChannels * 2 + lane * 16, end = hidden * 2;
        uint4 low, high;
        if (offset < end) low = __ldg(reinterpret_cast<const uint4*>(row + offset));
        if (offset + 512 < end) high = __ldg(reinterpret_cast<const uint4*>(row + offset + 512));
        for (int k = 0; k < p.num_topk; ++k) {
            char* slot = slots[k];
            if (slot == nullptr) continue;
            if (offset < end) *reinterpret_cast<uint4*>(slot + offset) = low;
            if (offset + 512 < end) *reinterpret_cast<uint4*>(slot + offset + 512) = high;
        }
    }
}

// Sends this rank's rows, then how many they are. Called by all threads of each block.
//
// Order: rows are plain stores. A barrier and an acquire-release by one thread of each block pass them to the last
// block, whose release at system scope tells the receivers.
//
// tables: shared memory for twice as many integers as there are experts.
template <bool kIsFp8, bool kIsIdx64>
__device__ __forceinline__ void send_rows(const DispatchParams& p, unsigned long long epoch, Members& members,
                                          int* tables) {
    __shared__ SendRound round;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int num_pieces = (p.call.hidden + kRowPieceChannels - 1) / kRowPieceChannels;
    // Consecutive pieces of rows for each block, as even as can be.
    const long long num_tasks = static_cast<long long>(p.num_tokens) * num_pieces;
    const long long begin = num_tasks * blockIdx.x / gridDim.x, end = num_tasks * (blockIdx.x + 1ll) / gridDim.x;
    const int first_token = static_cast<int>(begin / num_pieces);
    const int end_token = static_cast<int>((end + num_pieces - 1) / num_pieces);
    int* totals = tables;
    int* before = tables + p.call.num_experts;
    find_members(p.call, members);
    count_selections<kIsIdx64>(p, first_token, totals, before);
    wait_for_free_slabs(p.call, epoch, members);
    const int round_tokens = kRoundEntries / p.num_topk;
    for (int token0 = first_token; begin < end && token0 < end_token; token0 += round_tokens) {
        const int num_tokens = min(round_tokens, end_token - token0);
        find_slots<kIsFp8, kIsIdx64>(p, members, epoch, token0, num_tokens, before, round);
        const long long round_begin = max(begin, static_cast<long long>(token0) * num_pieces);
        const long long round_end = min(end, static_cast<long long>(token0 + num_tokens) * num_pieces);
        for (long long task = round_begin + warp; task < round_end; task += kNumWarps) {
            const int token = static_cast<int>(task / num_pieces), piece = static_cast<int>(task % num_pieces);
            send_piece<kIsFp8>(p, token, piece, round.slots + (token - token0) * p.num_topk, lane);
        }
    }
    if (!is_last_block(&p.call.state->num_done_sending)) return;
    const int num_local = num_local_experts(p.call);
    for (int expert = static_cast<int>(threadIdx.x); expert < p.call.num_experts; expert += kNumThreads) {
        const int rank = expert / num_local;
        const int num_rows = min(totals[expert], p.call.num_max_tokens);
        if (totals[expert] > num_rows)
            comm::report_timeout(p.call.notes, kNoteTooMany, p.call.wait.rank, num_rows, expert, 0);
        if (!may_tell(p.call, members, rank)) continue;
        unsigned long long* word =
            &signals_of(p.call, rank)->counts[epoch % 2][p.call.team.rank * num_local + expert % num_local];
        ptx::st_release<ptx::Scope::kSys>(word, make_word(p.call, epoch, static_cast<unsigned>(num_rows)));
    }
    count_sent(p.call, members, epoch);
}

}  // namespace deep_ep_legacy::low_latency
