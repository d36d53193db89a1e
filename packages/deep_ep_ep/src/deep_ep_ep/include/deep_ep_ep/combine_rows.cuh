// The sums of combine, to the bit: the device side of `deep_ep_ep.reduction`.
//
// A sum starts at zero, is kept in float32 (float64 for float64 rows), takes its addends in the order of the calls, and
// is rounded once. Rows of one group are added up first, in a sum of their own that is rounded to the rows' type, and
// the result is one addend. Which rows those are, and their order, is for the caller to know.
#pragma once

#include <deep_ep_ep/row_element.cuh>

namespace deep_ep_ep {

// The sum of one thread's part of a piece: `kNumVectors` times 16 bytes.
template <RowType kType, int kNumVectors>
class RowSum {
   public:
    __device__ __forceinline__ void clear() {
        clear(sum_);
        clear(group_);
    }

    // Adds a row that is an addend by itself.
    __device__ __forceinline__ void add(const uint4 (&row)[kNumVectors]) {
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) add(sum_[v], row[v]);
    }

    // Adds a row of a group.
    __device__ __forceinline__ void add_to_group(const uint4 (&row)[kNumVectors]) {
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) add(group_[v], row[v]);
    }

    // Adds the group, rounded, and begins the next one.
    __device__ __forceinline__ void close_group() {
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) add(sum_[v], Vector::round(group_[v]));
        clear(group_);
    }

    // The sum, rounded.
    __device__ __forceinline__ void round(uint4 (&row)[kNumVectors]) const {
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) row[v] = Vector::round(sum_[v]);
    }

   private:
    using Vector = RowVector<kType>;
    using Number = typename Vector::Number;
    static constexpr int kNumElements = Vector::kNumElements;

    static __device__ __forceinline__ void clear(Number (&sums)[kNumVectors][kNumElements]) {
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) {
#pragma unroll
            for (int i = 0; i < kNumElements; ++i) sums[v][i] = 0;
        }
    }

    static __device__ __forceinline__ void add(Number (&sum)[kNumElements], const uint4& bits) {
        Number values[kNumElements];
        Vector::widen(bits, values);
#pragma unroll
        for (int i = 0; i < kNumElements; ++i) sum[i] += values[i];
    }

    Number sum_[kNumVectors][kNumElements];
    Number group_[kNumVectors][kNumElements];
};

}  // namespace deep_ep_ep
