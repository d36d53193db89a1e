// LogFMT-10 in a slot: bfloat16 rows in ten bits a value, on a logarithmic scale for each group of 128 channels. The
// formula, and which chunks are encoded, are those of `deep_ep_legacy.logfmt`.
//
// A slot holds the largest and the smallest magnitude of each group, two bfloat16 in a word; then, at a multiple of 16
// bytes, the chunks, each where it would lie as bfloat16. A chunk that is encoded fills the first 10/16 of its place.
// Chunks are of one or two halves of 512 channels; of a half, each lane of a warp has 16 channels, and their five words
// (nine bits a code, then 16 signs) stand 32 words apart, so that a warp's stores are whole lines.
//
// Logarithms are approximate, off by about 2^-22 (PTX ISA: "Floating Point Instructions: lg2"). A value between two
// codes may so take the other one; the bound of the error stays what it is.
#pragma once

#include <deep_ep_legacy/low_latency/state.cuh>

namespace deep_ep_legacy::low_latency {

inline constexpr int kHalfChannels = 512;
inline constexpr int kGroupChannels = 128;
inline constexpr int kLaneChannels = kHalfChannels / 32;
inline constexpr int kLanesPerGroup = kGroupChannels / kLaneChannels;
inline constexpr int kNumCodeWords = 5;
inline constexpr int kHalfBytes = kHalfChannels * 2;
inline constexpr int kEncodedHalfBytes = kNumCodeWords * 32 * 4;

// Halves of a chunk of rows of this size.
__device__ __forceinline__ int halves_of_chunk(int hidden) { return hidden % (2 * kHalfChannels) == 0 ? 2 : 1; }

__device__ __forceinline__ int pairs_bytes(int hidden) { return (hidden / kGroupChannels * 4 + 15) / 16 * 16; }

// The 16 channels of a lane, two in a word.
struct LaneValues {
    unsigned words[kLaneChannels / 2];
};

__device__ __forceinline__ LaneValues load_values(const char* from) {
    const uint4 low = *reinterpret_cast<const uint4*>(from), high = *reinterpret_cast<const uint4*>(from + 16);
    return LaneValues{{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

__device__ __forceinline__ void store_values(char* to, const LaneValues& values) {
    const unsigned(&w)[8] = values.words;
    *reinterpret_cast<uint4*>(to) = uint4{w[0], w[1], w[2], w[3]};
    *reinterpret_cast<uint4*>(to + 16) = uint4{w[4], w[5], w[6], w[7]};
}

// The largest and the smallest magnitude of the group that a lane's channels are in: low and high half of the word.
// Called by all lanes of a warp. A NaN is the largest.
__device__ __forceinline__ unsigned find_pair(const LaneValues& values) {
    unsigned largest = 0, smallest = 0x7fff7fffu;
#pragma unroll
    for (int i = 0; i < kLaneChannels / 2; ++i) {
        const unsigned magnitudes = values.words[i] & 0x7fff7fffu;
        largest = __vmaxu2(largest, magnitudes);
        smallest = __vminu2(smallest, magnitudes);
    }
    largest = max(largest & 0xffffu, largest >> 16);
    smallest = min(smallest & 0xffffu, smallest >> 16);
#pragma unroll
    for (int distance = 1; distance < kLanesPerGroup; distance *= 2) {
        largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
        smallest = min(smallest, __shfl_xor_sync(kAllLanes, smallest, distance));
    }
    return largest | smallest << 16;
}

// Whether a group may be encoded: all magnitudes below 1, and not all equal.
__device__ __forceinline__ bool is_encodable(unsigned pair) {
    constexpr unsigned kOne = 0x3f80u;
    return (pair & 0xffffu) < kOne && pair >> 16 < (pair & 0xffffu);
}

// Code c > 0 stands for 2^(low + (c - 1) * step).
struct LogScale {
    float low;
    float step;
    bool is_clipped;
};

__device__ __forceinline__ LogScale log_scale(unsigned pair) {
    constexpr float kMaxSpan = 32, kNumSteps = 510;
    const float high = __log2f(__uint_as_float(pair << 16));
    const float low = __log2f(__uint_as_float(pair & 0xffff0000u));
    const bool is_clipped = low < high - kMaxSpan;
    const float bottom = is_clipped ? high - kMaxSpan : low;
    return LogScale{bottom, __fdiv_rn(high - bottom, kNumSteps), is_clipped};
}

// Writes a half of a chunk that is encoded. Called by all lanes of a warp.
__device__ __forceinline__ void encode_half(char* to, const LaneValues& values, unsigned pair, int lane) {
    const LogScale scale = log_scale(pair);
    const float steps = __frcp_rn(scale.step);
    const float border = __log2f((1 + exp2f(scale.step)) / 2) * steps;
    unsigned codes[kNumCodeWords] = {};
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
        const unsigned bits = i % 2 == 0 ? values.words[i / 2] << 16 : values.words[i / 2] & 0xffff0000u;
        const float magnitude = __uint_as_float(bits & 0x7fffffffu);
        const float exact = floorf((__log2f(magnitude) - scale.low) * steps + (2 - border));
        const float least = magnitude > 0 && !scale.is_clipped ? 1 : 0;
        const unsigned code = static_cast<unsigned>(fminf(fmaxf(exact, least), 511));
        const int word = i * 9 / 32, shift = i * 9 % 32;
        codes[word] |= code << shift;
        if (shift > 32 - 9) codes[word + 1] |= code >> (32 - shift);
        codes[kNumCodeWords - 1] |= (bits >> 31) << (16 + i);
    }
    unsigned* words = reinterpret_cast<unsigned*>(to);
#pragma unroll
    for (int word = 0; word < kNumCodeWords; ++word) words[word * 32 + lane] = codes[word];
}

// The 16 channels of a lane, of words that were read from a half of a chunk that is encoded.
__device__ __forceinline__ void decode_half(const LaneValues& words, unsigned pair, float (&values)[kLaneChannels]) {
    const LogScale scale = log_scale(pair);
    const unsigned(&codes)[kLaneChannels / 2] = words.words;
#pragma unroll
    for (int i = 0; i < kLaneChannels; ++i) {
        const int word = i * 9 / 32, shift = i * 9 % 32;
        unsigned code = codes[word] >> shift;
        if (shift > 32 - 9) code |= codes[word + 1] << (32 - shift);
        code &= 511;
        const float magnitude =
            code == 0 ? 0 : exp2f(__fadd_rn(scale.low, __fmul_rn(static_cast<float>(code) - 1, scale.step)));
        const unsigned sign = codes[kNumCodeWords - 1] >> (16 + i) & 1;
        values[i] = sign != 0 ? -magnitude : magnitude;
    }
}

}  // namespace deep_ep_legacy::low_latency
