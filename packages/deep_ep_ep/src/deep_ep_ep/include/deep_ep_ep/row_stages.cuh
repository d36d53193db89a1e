// Rows on their way through shared memory: each warp has a stage of its own, into which it loads a piece of a row by
// one bulk copy, and from which its lanes store it, each to a place of its own.
//
// Loads and stores go through the async proxy, so that no thread touches the payload. There is one stage a warp, not
// two: with 14 rows of 14 KiB an SM has 200 KB on the move, several times what its share of the memory's bandwidth
// needs.
#pragma once

#include <deep_ep_core/comm/mbarrier_wait.cuh>
#include <deep_ep_core/ptx/bulk_copy.cuh>
#include <deep_ep_core/ptx/fence.cuh>
#include <deep_ep_core/ptx/mbarrier.cuh>
#include <deep_ep_ep/dispatch_params.cuh>

namespace deep_ep_ep {

inline constexpr int kStageAlignment = 128;

// The stage of a warp.
struct RowStage {
    unsigned char* piece;
    unsigned long long* barrier;
    unsigned parity;  // of the load to wait for next
    bool is_loading;  // the first piece of this warp is under way, or in the stage
};

// Makes the barriers of all stages. Called by all threads of the block, once; a barrier of the block must follow.
__device__ __forceinline__ void init_stages(unsigned long long* barriers) {
    if (threadIdx.x == 0) {
        for (int warp = 0; warp < kNumWarps; ++warp) ptx::mbarrier_init(&barriers[warp], 1);
        ptx::fence_mbarrier_init();
    }
}

__device__ __forceinline__ RowStage row_stage(const DispatchParams& p, unsigned char* smem,
                                              unsigned long long* barriers) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    RowStage stage;
    stage.piece = smem + p.stages_offset + static_cast<long long>(warp) * align_up(p.piece_bytes, kStageAlignment);
    stage.barrier = &barriers[warp];
    stage.parity = 0;
    stage.is_loading = false;
    return stage;
}

// Lets a stage be filled again: all stores from it have read it. Called by all lanes.
__device__ __forceinline__ void free_stage() {
    ptx::bulk_wait_read<0>();
    __syncwarp();
}

// Begins to load a piece. Called by all lanes; the stage must be free.
__device__ __forceinline__ void begin_load(const RowStage& stage, const unsigned char* from, int num_bytes,
                                           ptx::CachePolicy policy) {
    if (threadIdx.x % 32 == 0) {
        ptx::mbarrier_arrive_expect_tx(stage.barrier, static_cast<unsigned>(num_bytes));
        ptx::bulk_load(stage.piece, from, static_cast<unsigned>(num_bytes), stage.barrier, policy);
    }
}

// Waits for the load. Called by all lanes; the same answer in all of them: false if it did not come.
[[nodiscard]] __device__ __forceinline__ bool end_load(const DispatchParams& p, RowStage& stage) {
    const bool has_come = comm::wait_mbarrier(stage.barrier, stage.parity, p.wait, kPhaseLoad, p.wait.rank);
    stage.parity ^= 1;
    return __all_sync(0xffffffffu, has_come) != 0;
}

}  // namespace deep_ep_ep
