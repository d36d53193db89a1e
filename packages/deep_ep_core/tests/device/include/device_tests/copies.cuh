// y = x, or y = ~x, through shared memory by bulk copies, with loads, changes and stores in flight at once.
#pragma once

#include <deep_ep_core/comm/mbarrier_wait.cuh>
#include <deep_ep_core/ptx/bulk_copy.cuh>
#include <deep_ep_core/ptx/fence.cuh>
#include <deep_ep_core/ptx/red.cuh>

namespace device_tests {

namespace comm = deep_ep_core::comm;
namespace ptx = deep_ep_core::ptx;

enum class CacheHint : int { kNone = 0, kEvictFirst = 1, kEvictNormal = 2, kEvictLast = 3 };

struct CopyBytesConfig {
    CacheHint hint;
    bool is_inverted;  // each byte is changed in shared memory, by plain accesses
};

struct CopyBytesParams {
    comm::WaitParams wait;
    const void* x;
    void* y;
    int num_chunks;
    unsigned chunk_bytes;   // a multiple of 16
    unsigned stage_bytes;   // from one stage to the next in shared memory: at least chunk_bytes, a multiple of 16
    unsigned smem_offset;   // of the first stage, a multiple of 16
    unsigned* num_failures;
};

inline constexpr int kNumStages = 3;

// For a block of any size. Thread 0 issues all copies.
template <CopyBytesConfig kConfig>
class ByteCopy {
   public:
    __device__ __forceinline__ explicit ByteCopy(const CopyBytesParams& p) : p_(p) {
        if constexpr (kConfig.hint == CacheHint::kEvictFirst) policy_ = ptx::evict_first_policy();
        if constexpr (kConfig.hint == CacheHint::kEvictNormal) policy_ = ptx::evict_normal_policy();
        if constexpr (kConfig.hint == CacheHint::kEvictLast) policy_ = ptx::evict_last_policy();
    }

    __device__ __forceinline__ void load(unsigned char* stage, unsigned long long* barrier, int chunk) const {
        const char* from = static_cast<const char*>(p_.x) + offset_of(chunk);
        ptx::mbarrier_arrive_expect_tx(barrier, p_.chunk_bytes);
        if constexpr (kConfig.hint == CacheHint::kNone)
            ptx::bulk_load(stage, from, p_.chunk_bytes, barrier);
        else
            ptx::bulk_load(stage, from, p_.chunk_bytes, barrier, policy_);
    }

    __device__ __forceinline__ void store(const unsigned char* stage, int chunk) const {
        char* to = static_cast<char*>(p_.y) + offset_of(chunk);
        if constexpr (kConfig.hint == CacheHint::kNone)
            ptx::bulk_store(to, stage, p_.chunk_bytes);
        else
            ptx::bulk_store(to, stage, p_.chunk_bytes, policy_);
        ptx::bulk_commit();
    }

   private:
    __device__ __forceinline__ long long offset_of(int chunk) const {
        return static_cast<long long>(chunk) * p_.chunk_bytes;
    }

    const CopyBytesParams& p_;
    ptx::CachePolicy policy_{0};
};

__device__ __forceinline__ void invert(unsigned char* stage, unsigned num_bytes) {
    uint4* vectors = reinterpret_cast<uint4*>(stage);
    for (unsigned idx = threadIdx.x; idx < num_bytes / 16; idx += blockDim.x) {
        const uint4 v = vectors[idx];
        vectors[idx] = uint4{~v.x, ~v.y, ~v.z, ~v.w};
    }
}

template <CopyBytesConfig kConfig>
__device__ __forceinline__ void copy_bytes(const CopyBytesParams& p) {
    extern __shared__ __align__(128) unsigned char smem[];
    __shared__ unsigned long long is_loaded[kNumStages], is_changed[kNumStages];
    const ByteCopy<kConfig> copy(p);
    const auto stage_of = [&p](int step) { return smem + p.smem_offset + (step % kNumStages) * p.stage_bytes; };
    const auto chunk_of = [](int step) { return static_cast<int>(blockIdx.x) + step * static_cast<int>(gridDim.x); };
    const bool is_leader = threadIdx.x == 0;
    if (is_leader) {
        for (int stage = 0; stage < kNumStages; ++stage) {
            ptx::mbarrier_init(&is_loaded[stage], 1);
            ptx::mbarrier_init(&is_changed[stage], blockDim.x);
        }
        ptx::fence_mbarrier_init();
        for (int step = 0; step < kNumStages - 1; ++step)
            if (chunk_of(step) < p.num_chunks) copy.load(stage_of(step), &is_loaded[step], chunk_of(step));
    }
    __syncthreads();
    for (int step = 0; chunk_of(step) < p.num_chunks; ++step) {
        const int stage = step % kNumStages;
        const unsigned parity = static_cast<unsigned>(step / kNumStages) & 1u;
        if (!comm::wait_mbarrier(&is_loaded[stage], parity, p.wait, 0, p.wait.rank)) {
            ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_failures, 1u);
            break;
        }
        if constexpr (kConfig.is_inverted) invert(stage_of(step), p.chunk_bytes);
        // Each thread lets the store, which is an asynchronous access, see its plain ones; the arrival then tells the
        // leader so. The same pair stands between these plain accesses and the load that will overwrite the stage.
        ptx::fence_proxy_async_shared();
        ptx::mbarrier_arrive(&is_changed[stage]);
        if (is_leader) {
            if (!comm::wait_mbarrier(&is_changed[stage], parity, p.wait, 1, p.wait.rank)) {
                ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_failures, 1u);
                break;
            }
            copy.store(stage_of(step), chunk_of(step));
            // All stores but the one just issued have read their stages: that of the step before may be filled again.
            ptx::bulk_wait_read<1>();
            const int next_step = step + kNumStages - 1;
            if (chunk_of(next_step) < p.num_chunks)
                copy.load(stage_of(next_step), &is_loaded[next_step % kNumStages], chunk_of(next_step));
        }
    }
    // Shared memory must outlive the stores that read it; the end of the kernel then publishes what they wrote.
    if (is_leader) ptx::bulk_wait<0>();
    __syncthreads();
    if (is_leader) {
        for (int stage = 0; stage < kNumStages; ++stage) {
            ptx::mbarrier_inval(&is_loaded[stage]);
            ptx::mbarrier_inval(&is_changed[stage]);
        }
    }
}

}  // namespace device_tests
