// y = x * factor + bias, in four ways that each need one launch attribute, or none. For tests.
#pragma once

#include <toy/vector.cuh>

namespace toy {

enum class Wait : int { kNothing = 0, kGrid = 1, kCluster = 2, kPreviousKernel = 3 };

struct ScaleConfig {
    int factor;
    Wait wait;
    bool has_bias;
};

struct ScaleParams {
    const float* x;
    Vector y;
    float bias;
    unsigned* num_arrived;  // zero before each launch with Wait::kGrid
    unsigned long long stamps[2];
    long long first_idx;
    bool is_reversed;
};

// Called by all threads of a cooperative launch: returns when every block has come here.
__device__ __forceinline__ void wait_for_grid(unsigned* num_arrived) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(num_arrived, 1u);
        while (atomicAdd(num_arrived, 0u) < gridDim.x) {
        }
    }
    __syncthreads();
}

// Called by all threads of a cluster: the sum over the cluster of 1 a block, so its number of blocks.
__device__ __forceinline__ unsigned count_cluster_blocks() {
    unsigned num_blocks;
    asm volatile("barrier.cluster.arrive.aligned;\n barrier.cluster.wait.aligned;" ::: "memory");
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(num_blocks));
    return num_blocks;
}

template <ScaleConfig kConfig>
__device__ __forceinline__ void scale(const ScaleParams& p) {
    if constexpr (kConfig.wait == Wait::kPreviousKernel) {
        asm volatile("griddepcontrol.launch_dependents;");
        asm volatile("griddepcontrol.wait;" ::: "memory");
    }
    float bias = kConfig.has_bias ? p.bias : 0.0f;
    if constexpr (kConfig.wait == Wait::kCluster) bias += static_cast<float>(count_cluster_blocks());
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long begin = p.first_idx + static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (long long idx = begin; idx < p.y.num_values; idx += stride)
        p.y.values[idx] = p.x[idx] * static_cast<float>(kConfig.factor) + bias;
    if constexpr (kConfig.wait == Wait::kGrid) {
        // The mirror image was written by another block: a swap in place is right only if all blocks have written.
        wait_for_grid(p.num_arrived);
        for (long long idx = begin; idx < p.y.num_values / 2; idx += stride) {
            const float front = p.y.values[idx];
            p.y.values[idx] = p.y.values[p.y.num_values - 1 - idx];
            p.y.values[p.y.num_values - 1 - idx] = front;
        }
    }
}

// The same as scale with a factor of 1, through an array that only local memory can hold.
template <ScaleConfig kConfig>
__device__ __forceinline__ void scale_in_local_memory(const ScaleParams& p) {
    float parts[64];
    for (int idx = 0; idx < 64; ++idx) parts[idx] = p.x[idx];
    for (int idx = 0; idx < p.y.num_values; ++idx)
        parts[static_cast<int>(p.x[idx]) & 63] += parts[idx & 63] + p.bias;
    p.y.values[threadIdx.x] = parts[threadIdx.x & 63];
}

}  // namespace toy
