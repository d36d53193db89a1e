// Rows that lie in runs of known lengths, numbered one behind the other: how a kernel's warps share them evenly.
#pragma once

#include <deep_ep_legacy/low_latency/state.cuh>

namespace deep_ep_legacy::low_latency {

// Turns `num_runs` lengths into where each run begins, and leaves the sum of all in `firsts[num_runs]`. In shared
// memory; called by all threads of a block. A barrier must stand between the lengths' stores and the call; the call
// ends with one.
__device__ __forceinline__ void number_runs(int* firsts, int num_runs) {
    __shared__ int warp_sums[kNumWarps];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int num_each = (num_runs + kNumThreads - 1) / kNumThreads;
    const int begin = min(thread * num_each, num_runs), end = min(begin + num_each, num_runs);
    int sum = 0;
    for (int run = begin; run < end; ++run) sum += firsts[run];
    int before = sum;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, before, distance);
        if (lane >= distance) before += other;
    }
    if (lane == 31) warp_sums[warp] = before;
    before -= sum;
    __syncthreads();
    for (int other = 0; other < warp; ++other) before += warp_sums[other];
    for (int run = begin; run < end; ++run) {
        const int length = firsts[run];
        firsts[run] = before;
        before += length;
    }
    // Behind the others' barrier, and read only behind the next: the last thread's sum is that of all.
    if (thread == kNumThreads - 1) firsts[num_runs] = before;
    __syncthreads();
}

// The run that holds a row. Called with `row` below the sum of all lengths.
__device__ __forceinline__ int run_of(const int* firsts, int num_runs, int row) {
    int low = 0, high = num_runs;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (firsts[middle] <= row)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Copies up to 2 KiB, all of it under way at once. Called by all lanes of a warp.
//
// num_bytes: a multiple of 16, as both addresses are.
__device__ __forceinline__ void copy_piece(char* to, const char* from, int num_bytes, int lane) {
    constexpr int kNumVectors = 4;
    uint4 vectors[kNumVectors];
#pragma unroll
    for (int i = 0; i < kNumVectors; ++i) {
        const int offset = (i * 32 + lane) * 16;
        if (offset < num_bytes) vectors[i] = *reinterpret_cast<const uint4*>(from + offset);
    }
#pragma unroll
    for (int i = 0; i < kNumVectors; ++i) {
        const int offset = (i * 32 + lane) * 16;
        if (offset < num_bytes) *reinterpret_cast<uint4*>(to + offset) = vectors[i];
    }
}

inline constexpr int kPieceBytes = 2048;

}  // namespace deep_ep_legacy::low_latency
