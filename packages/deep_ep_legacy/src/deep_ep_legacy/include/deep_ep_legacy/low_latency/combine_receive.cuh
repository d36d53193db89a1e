// The half of a combine that receives: each token's rows are summed with its weights.
#pragma once

#include <deep_ep_legacy/low_latency/combine_params.cuh>

namespace deep_ep_legacy::low_latency {

// Rows that a warp has under way at once, as bfloat16 and as LogFMT.
inline constexpr int kNumRowsAtOnce = 8;
inline constexpr int kNumCodedAtOnce = 4;

// Two floats as bfloat16, rounded to nearest even: `low` in the low half.
// cvt.rn.bf16x2.f32. PTX ISA: "Data Movement and Conversion Instructions: cvt".
__device__ __forceinline__ unsigned round_two(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// A selection of a token, as one lane knows it; null: nothing came for it.
struct Selection {
    const char* slot;
    float weight;
};

template <bool kIsLogfmt, bool kIsIdx64>
__device__ __forceinline__ Selection find_selection(const CombineParams& p, const Members& members, char* slab,
                                                    int token, int k) {
    if (k >= p.num_topk) return Selection{nullptr, 0};
    const long long entry = static_cast<long long>(token) * p.num_topk + k;
    long long expert;
    if constexpr (kIsIdx64)
        expert = static_cast<const long long*>(p.topk_idx)[entry];
    else
        expert = static_cast<const int*>(p.topk_idx)[entry];
    if (expert < 0 || expert >= p.call.num_experts) return Selection{nullptr, 0};
    const int idx = static_cast<int>(expert);
    if (!members.is_active[idx / num_local_experts(p.call)]) return Selection{nullptr, 0};
    return Selection{returned_slot<kIsLogfmt>(p.call, slab, idx, token), p.topk_weights[entry]};
}

__device__ __forceinline__ Selection share(const Selection& selection, int lane) {
    const unsigned long long slot =
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(selection.slot), lane);
    return Selection{reinterpret_cast<const char*>(slot), __shfl_sync(kAllLanes, selection.weight, lane)};
}

// One term, rounded before it is added, as a multiplication and an addition of tensors are.
__device__ __forceinline__ void add_term(float& sum, float value, float weight) {
    sum = __fadd_rn(sum, __fmul_rn(value, weight));
}

// Sums 256 channels of a token. Called by all lanes of a warp; each has 8 channels.
template <bool kIsIdx64>
__device__ __forceinline__ void sum_piece(const CombineParams& p, const Members& members, char* slab, int token,
                                          int piece, int lane) {
    const int offset = (piece * 32 + lane) * 16;
    const bool is_inside = offset < p.call.hidden * 2;
    float sums[8] = {};
    for (int first_k = 0; first_k < p.num_topk; first_k += kNumRowsAtOnce) {
        const Selection own = find_selection<false, kIsIdx64>(p, members, slab, token, first_k + lane % kNumRowsAtOnce);
        uint4 rows[kNumRowsAtOnce];
        float weights[kNumRowsAtOnce];
        bool is_there[kNumRowsAtOnce];
#pragma unroll
        for (int i = 0; i < kNumRowsAtOnce; ++i) {
            const Selection selection = share(own, i);
            is_there[i] = selection.slot != nullptr;
            weights[i] = selection.weight;
            if (is_there[i] && is_inside) rows[i] = *reinterpret_cast<const uint4*>(selection.slot + offset);
        }
#pragma unroll
        for (int i = 0; i < kNumRowsAtOnce; ++i) {
            if (!is_there[i] || !is_inside) continue;
            const unsigned words[4] = {rows[i].x, rows[i].y, rows[i].z, rows[i].w};
#pragma unroll
            for (int word = 0; word < 4; ++word) {
                add_term(sums[2 * word], __uint_as_float(words[word] << 16), weights[i]);
                add_term(sums[2 * word + 1], __uint_as_float(words[word] & 0xffff0000u), weights[i]);
            }
        }
    }
    if (!is_inside) return;
    char* out = static_cast<char*>(p.out) + static_cast<long long>(token) * p.call.hidden * 2 + offset;
    *reinterpret_cast<uint4*>(out) = uint4{round_two(sums[0], sums[1]), round_two(sums[2], sums[3]),
                                           round_two(sums[4], sums[5]), round_two(sums[6], sums[7])};
}

// What a lane reads of one half of a chunk of a slot.
struct CodedHalf {
    LaneValues words;  // the row's own, or codes in the first five
    unsigned pair;     // of the lane's group
    bool is_encoded;
};

// Reads one half of a chunk. Called by all lanes of a warp, all for the same slot.
__device__ __forceinline__ CodedHalf read_half(const char* slot, int hidden, int half_idx, int lane) {
    constexpr int kHalfGroups = kHalfChannels / kGroupChannels;
    const int num_halves = halves_of_chunk(hidden), chunk = half_idx / num_halves, half = half_idx % num_halves;
    const unsigned* pairs = reinterpret_cast<const unsigned*>(slot);
    const int num_groups = num_halves * kHalfGroups;
    CodedHalf found;
    found.pair = pairs[half_idx * kHalfGroups + lane / kLanesPerGroup];
    found.is_encoded = __all_sync(kAllLanes, is_encodable(pairs[chunk * num_groups + lane % num_groups])) != 0;
    const char* from = slot + pairs_bytes(hidden) + chunk * num_halves * kHalfBytes;
    if (found.is_encoded) {
        const unsigned* codes = reinterpret_cast<const unsigned*>(from + half * kEncodedHalfBytes);
#pragma unroll
        for (int word = 0; word < kNumCodeWords; ++word) found.words.words[word] = codes[word * 32 + lane];
    } else {
        found.words = load_values(from + half * kHalfBytes + lane * (kLaneChannels * 2));
    }
    return found;
}

__device__ __forceinline__ void values_of(const CodedHalf& half, float (&values)[kLaneChannels]) {
    if (half.is_encoded) {
        decode_half(half.words, half.pair, values);
        return;
    }
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
        const unsigned word = half.words.words[i / 2];
        values[i] = __uint_as_float(i % 2 == 0 ? word << 16 : word & 0xffff0000u);
    }
}

// Sums 512 channels of a token whose rows came as LogFMT. Called by all lanes of a warp.
template <bool kIsIdx64>
__device__ __forceinline__ void sum_half(const CombineParams& p, const Members& members, char* slab, int token,
                                         int half_idx, int lane) {
    float sums[kLaneChannels] = {};
    for (int first_k = 0; first_k < p.num_topk; first_k += kNumCodedAtOnce) {
        const Selection own = find_selection<true, kIsIdx64>(p, members, slab, token, first_k + lane % kNumCodedAtOnce);
        CodedHalf halves[kNumCodedAtOnce];
        float weights[kNumCodedAtOnce];
        bool is_there[kNumCodedAtOnce];
#pragma unroll
        for (int i = 0; i < kNumCodedAtOnce; ++i) {
            const Selection selection = share(own, i);
            is_there[i] = selection.slot != nullptr;
            weights[i] = selection.weight;
            if (is_there[i]) halves[i] = read_half(selection.slot, p.call.hidden, half_idx, lane);
        }
#pragma unroll
        for (int i = 0; i < kNumCodedAtOnce; ++i) {
            if (!is_there[i]) continue;
            float values[kLaneChannels];
            values_of(halves[i], values);
#pragma unroll
            for (int channel = 0; channel < kLaneChannels; ++channel)
                add_term(sums[channel], values[channel], weights[i]);
        }
    }
    LaneValues rounded;
#pragma unroll
    for (int i = 0; i < kLaneChannels / 2; ++i) rounded.words[i] = round_two(sums[2 * i], sums[2 * i + 1]);
    char* out = static_cast<char*>(p.out) + static_cast<long long>(token) * p.call.hidden * 2;
    store_values(out + half_idx * kHalfBytes + lane * (kLaneChannels * 2), rounded);
}

// Waits for the rows of all ranks; those that did not come are no members any more. Called by all threads of each
// block; ends with a barrier.
__device__ __forceinline__ void wait_for_flags(const CallParams& call, unsigned long long epoch, Members& members) {
    const Signals* signals = signals_of(call, call.team.rank);
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    for (int rank = static_cast<int>(threadIdx.x); rank < call.team.num_ranks; rank += kNumThreads) {
        const int count = wait_for_word(call, kPhaseRows, rank, &signals->flags[epoch % 2][rank], rank, epoch);
        members.is_active[rank] = count >= 0;
        members.waited_ns[rank] = ptx::globaltimer_ns() - begin_ns;
    }
    __syncthreads();
}

// Receives and sums. Called by all threads of each block. The order is that of `receive_rows` in dispatch.
template <bool kIsLogfmt, bool kIsIdx64>
__device__ __forceinline__ void sum_rows(const CombineParams& p, unsigned long long epoch, Members& members) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    // The sending half is done with what it knew of the members.
    __syncthreads();
    wait_for_flags(p.call, epoch, members);
    if (blockIdx.x == 0) add_wait_stats(p.call, members);
    char* slab = slab_of(p.call, p.call.team.rank, epoch);
    constexpr int kTaskChannels = kIsLogfmt ? kHalfChannels : 256;
    const int num_pieces = (p.call.hidden + kTaskChannels - 1) / kTaskChannels;
    const long long num_tasks = static_cast<long long>(p.num_tokens) * num_pieces;
    for (long long task = static_cast<long long>(blockIdx.x) * kNumWarps + warp; task < num_tasks;
         task += static_cast<long long>(gridDim.x) * kNumWarps) {
        const int token = static_cast<int>(task / num_pieces), piece = static_cast<int>(task % num_pieces);
        if constexpr (kIsLogfmt)
            sum_half<kIsIdx64>(p, members, slab, token, piece, lane);
        else
            sum_piece<kIsIdx64>(p, members, slab, token, piece, lane);
    }
    if (is_last_block(&p.call.state->num_done_receiving)) tell_received(p.call, epoch);
}

}  // namespace deep_ep_legacy::low_latency
