// The cast of a dispatch: bfloat16 to e4m3, with one scale for 128 channels. To the bit what
// `deep_ep_legacy.low_latency_fp8` does.
#pragma once

namespace deep_ep_legacy::low_latency {

inline constexpr int kChannelsPerScale = 128;
inline constexpr int kChannelsPerLane = 16;
inline constexpr int kLanesPerScale = kChannelsPerScale / kChannelsPerLane;

// Two floats as e4m3, rounded to nearest even, beyond 448 as 448: `low` in the low byte.
// cvt.rn.satfinite.e4m3x2.f32. PTX ISA: "Data Movement and Conversion Instructions: cvt".
__device__ __forceinline__ unsigned cast_two(float low, float high) {
    unsigned short pair;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
    return pair;
}

struct Scale {
    float scale;       // what the payload is multiplied with to get the values back
    float multiplier;  // what the values are multiplied with
};

// The scale of a group whose largest magnitude has these bits, as bfloat16. Bits are compared and not numbers, so that
// a NaN counts as the largest.
__device__ __forceinline__ Scale scale_of(unsigned max_bits, bool is_rounded) {
    constexpr float kMax = 448.0f, kMinAmax = 1e-4f;
    float amax = __uint_as_float(max_bits << 16);
    if (amax < kMinAmax) amax = kMinAmax;
    Scale result{__fdiv_rn(amax, kMax), __fdiv_rn(kMax, amax)};
    if (is_rounded) {
        // Up to the next power of two, unless it is one.
        const unsigned bits = __float_as_uint(result.scale);
        result.scale = __uint_as_float(((bits >> 23) + ((bits & 0x7fffffu) != 0)) << 23);
        result.multiplier = __frcp_rn(result.scale);
    }
    return result;
}

// Casts 16 channels of each lane; 8 lanes share a group of 128. Called by all lanes of a warp; lanes past the row's end
// pass zeros.
__device__ __forceinline__ uint4 cast_channels(const uint4 (&values)[2], bool is_rounded, float& scale) {
    const unsigned words[8] = {values[0].x, values[0].y, values[0].z, values[0].w,
                               values[1].x, values[1].y, values[1].z, values[1].w};
    unsigned largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = __vmaxu2(largest, words[i] & 0x7fff7fffu);
    largest = max(largest & 0xffffu, largest >> 16);
#pragma unroll
    for (int distance = 1; distance < kLanesPerScale; distance *= 2)
        largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
    const Scale group = scale_of(largest, is_rounded);
    scale = group.scale;
    unsigned cast[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        unsigned halves[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned word = words[2 * i + half];
            halves[half] = cast_two(__fmul_rn(__uint_as_float(word << 16), group.multiplier),
                                    __fmul_rn(__uint_as_float(word & 0xffff0000u), group.multiplier));
        }
        cast[i] = halves[0] | halves[1] << 16;
    }
    return uint4{cast[0], cast[1], cast[2], cast[3]};
}

}  // namespace deep_ep_legacy::low_latency
