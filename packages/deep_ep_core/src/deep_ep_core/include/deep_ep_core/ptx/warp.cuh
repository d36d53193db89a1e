// A thread's place in its warp, and the choice of one thread.
//
// For shuffles and votes use CUDA's own `__shfl_sync`, `__ballot_sync` and the like.
#pragma once

namespace deep_ep_core::ptx {

// Place of this thread in its warp, 0 to 31, which need not be `threadIdx.x % 32` in a block of several dimensions.
// %laneid. PTX ISA: "Special Registers: %laneid".
__device__ __forceinline__ unsigned lane_idx() {
    unsigned lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// True in exactly one thread of the warp, the same one every time. Called by all 32 threads of a warp together.
// elect.sync. PTX ISA: "Parallel Synchronization and Communication Instructions: elect.sync".
__device__ __forceinline__ bool elect_one() {
    unsigned is_elected;
    asm volatile(
        "{\n"
        " .reg .pred is_elected;\n"
        " elect.sync _|is_elected, 0xffffffff;\n"
        " selp.u32 %0, 1, 0, is_elected;\n"
        "}"
        : "=r"(is_elected)::"memory");
    return is_elected != 0;
}

}  // namespace deep_ep_core::ptx
