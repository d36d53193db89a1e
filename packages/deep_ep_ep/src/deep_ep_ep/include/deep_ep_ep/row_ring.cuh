// A ring of pieces of rows on their way into the shared memory of one warp.
//
// Why bulk copies and not loads into registers: a warp that loads into registers has nothing in flight while it adds
// and stores, and never more than the rows of one token. The ring is refilled piece by piece, across tokens, so a block
// has `kNumBlockBytes` in flight all the time, however many rows a token has. That is what few SMs need to fill a link
// or the memory. The price is a trip through shared memory, which is far from its limit.
#pragma once

#include <deep_ep_core/comm/mbarrier_wait.cuh>
#include <deep_ep_core/ptx/bulk_copy.cuh>
#include <deep_ep_core/ptx/fence.cuh>
#include <deep_ep_ep/rank_state.cuh>

namespace deep_ep_ep {

inline constexpr unsigned kAllLanes = 0xffffffffu;

class RowRing {
   public:
    static constexpr int kNumWarps = 8;    // warps of a block, each with a ring of its own
    static constexpr int kNumStages = 12;  // pieces of a ring
    static constexpr int kNumVectors = 4;  // 16-byte parts of a piece that a lane takes
    static constexpr int kPieceBytes = kNumVectors * 32 * 16;
    static constexpr int kNumBlockBytes = kNumWarps * kNumStages * kPieceBytes;  // dynamic shared memory of a block

    // Called by all lanes of a warp. `stages` are the warp's `kNumStages` pieces, `barriers` as many mbarriers.
    __device__ __forceinline__ RowRing(unsigned char* stages, unsigned long long* barriers, int lane)
        : stages_(stages), barriers_(barriers), lane_(lane), policy_(ptx::evict_first_policy()) {
        if (lane == 0) {
            for (int stage = 0; stage < kNumStages; ++stage) ptx::mbarrier_init(&barriers[stage], 1);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
    }

    __device__ __forceinline__ bool is_full() const { return num_loading_ == kNumStages; }

    // Starts to load a piece. Called by all lanes, when the ring is not full. `row` is a place in shared memory that
    // holds the row's address, so that only the lane that issues the copy has to read it.
    __device__ __forceinline__ void load(const char* const* row, int offset, int num_bytes) {
        if (lane_ == 0) {
            unsigned long long* barrier = &barriers_[head_];
            ptx::mbarrier_arrive_expect_tx(barrier, static_cast<unsigned>(num_bytes));
            ptx::bulk_load(stages_ + head_ * kPieceBytes, *row + offset, static_cast<unsigned>(num_bytes), barrier,
                           policy_);
        }
        head_ = head_ + 1 == kNumStages ? 0 : head_ + 1;
        ++num_loading_;
    }

    // Takes the oldest piece out of the ring: waits for it, and reads this lane's vectors, those at lane + 32 * v. What
    // lies past the end of a short piece is undefined. Called by all lanes; false in all if it did not come in time,
    // and then the ring must not be used again.
    [[nodiscard]] __device__ __forceinline__ bool take(const comm::WaitParams& wait, uint4 (&piece)[kNumVectors]) {
        const bool has_come = comm::wait_mbarrier(&barriers_[tail_], parity_, wait, kPhaseLoad, wait.rank);
        if (!__all_sync(kAllLanes, has_come)) return false;
        const uint4* stage = reinterpret_cast<const uint4*>(stages_ + tail_ * kPieceBytes);
#pragma unroll
        for (int v = 0; v < kNumVectors; ++v) piece[v] = stage[v * 32 + lane_];
        // A copy may overwrite the stage as soon as lane 0 knows that all have read it.
        ptx::fence_proxy_async_shared();
        __syncwarp();
        if (++tail_ == kNumStages) {
            tail_ = 0;
            parity_ ^= 1;
        }
        --num_loading_;
        return true;
    }

   private:
    unsigned char* stages_;
    unsigned long long* barriers_;
    int lane_;
    ptx::CachePolicy policy_;  // each row is read once
    int head_ = 0;             // stage that is loaded next
    int tail_ = 0;             // stage that is taken next
    int num_loading_ = 0;      // stages that are loading or loaded
    unsigned parity_ = 0;      // of the phase that ends when the stage at the tail is loaded
};

}  // namespace deep_ep_ep
