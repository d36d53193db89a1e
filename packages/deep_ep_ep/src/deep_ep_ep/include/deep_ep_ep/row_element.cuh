// The elements of rows: 16 bytes of them at a time, in the types in which they are stored and in which they are added.
//
// Called by one thread. Sums of float64 rows are in float64, all others in float32.
#pragma once

namespace deep_ep_ep {

// Mirrored in `deep_ep_ep.device.combine_kernel`.
enum class RowType : int { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// The two halves of a word, the lower one first. A bfloat16 is the upper half of a float32.
__device__ __forceinline__ void widen_bfloat16(unsigned word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

// cvt.f32.f16. PTX ISA: "Data Movement and Conversion Instructions: cvt".
__device__ __forceinline__ void widen_float16(unsigned word, float& low, float& high) {
    asm("{\n"
        " .reg .b16 low, high;\n"
        " mov.b32 {low, high}, %2;\n"
        " cvt.f32.f16 %0, low;\n"
        " cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(low), "=f"(high)
        : "r"(word));
}

// Rounds to the nearest, ties to even. The instruction takes the upper half first.
// cvt.rn.bf16x2.f32. PTX ISA: as above.
__device__ __forceinline__ unsigned round_to_bfloat16(float low, float high) {
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// cvt.rn.f16x2.f32. PTX ISA: as above.
__device__ __forceinline__ unsigned round_to_float16(float low, float high) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// The elements in 16 bytes, as the numbers that are added.
template <RowType kType>
struct RowVector {
    static constexpr bool kIsHalf = kType == RowType::kBfloat16 || kType == RowType::kFloat16;
    static constexpr int kNumElements = kIsHalf ? 8 : 4;
    using Number = float;

    static __device__ __forceinline__ void widen(const uint4& bits, Number (&values)[kNumElements]) {
        if constexpr (kType == RowType::kBfloat16) {
            widen_bfloat16(bits.x, values[0], values[1]);
            widen_bfloat16(bits.y, values[2], values[3]);
            widen_bfloat16(bits.z, values[4], values[5]);
            widen_bfloat16(bits.w, values[6], values[7]);
        } else if constexpr (kType == RowType::kFloat16) {
            widen_float16(bits.x, values[0], values[1]);
            widen_float16(bits.y, values[2], values[3]);
            widen_float16(bits.z, values[4], values[5]);
            widen_float16(bits.w, values[6], values[7]);
        } else {
            values[0] = __uint_as_float(bits.x);
            values[1] = __uint_as_float(bits.y);
            values[2] = __uint_as_float(bits.z);
            values[3] = __uint_as_float(bits.w);
        }
    }

    static __device__ __forceinline__ uint4 round(const Number (&values)[kNumElements]) {
        if constexpr (kType == RowType::kBfloat16)
            return uint4{round_to_bfloat16(values[0], values[1]), round_to_bfloat16(values[2], values[3]),
                         round_to_bfloat16(values[4], values[5]), round_to_bfloat16(values[6], values[7])};
        else if constexpr (kType == RowType::kFloat16)
            return uint4{round_to_float16(values[0], values[1]), round_to_float16(values[2], values[3]),
                         round_to_float16(values[4], values[5]), round_to_float16(values[6], values[7])};
        else
            return uint4{__float_as_uint(values[0]), __float_as_uint(values[1]), __float_as_uint(values[2]),
                         __float_as_uint(values[3])};
    }
};

template <>
struct RowVector<RowType::kFloat64> {
    static constexpr int kNumElements = 2;
    using Number = double;

    static __device__ __forceinline__ void widen(const uint4& bits, Number (&values)[kNumElements]) {
        values[0] = __hiloint2double(static_cast<int>(bits.y), static_cast<int>(bits.x));
        values[1] = __hiloint2double(static_cast<int>(bits.w), static_cast<int>(bits.z));
    }

    static __device__ __forceinline__ uint4 round(const Number (&values)[kNumElements]) {
        const unsigned long long first = __double_as_longlong(values[0]), second = __double_as_longlong(values[1]);
        return uint4{static_cast<unsigned>(first), static_cast<unsigned>(first >> 32), static_cast<unsigned>(second),
                     static_cast<unsigned>(second >> 32)};
    }
};

}  // namespace deep_ep_ep
