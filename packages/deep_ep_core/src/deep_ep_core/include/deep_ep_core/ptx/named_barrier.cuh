// Barriers for some of the warps of a block.
#pragma once

namespace deep_ep_core::ptx {

// Meets other warps at a barrier of the block. Called by all lanes of as many warps as make `num_threads`, always the
// same number for one barrier at a time. `barrier_idx` is 1 to 15; 0 is that of `__syncthreads`. As with that one, what
// these threads did before is visible to them afterwards.
// bar.sync. PTX ISA: "Parallel Synchronization and Communication Instructions: bar / barrier".
__device__ __forceinline__ void named_barrier_sync(int barrier_idx, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier_idx), "r"(num_threads) : "memory");
}

}  // namespace deep_ep_core::ptx
