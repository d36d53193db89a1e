// Bulk asynchronous copies between global and shared memory (the one-dimensional form of TMA).
//
// Called by one thread. Both addresses and the size must be multiples of 16 bytes. A copy goes through the async proxy
// and is ordered with nothing but what follows from waiting for it:
//
// - A load completes on an mbarrier, with the bytes it brought. The thread that issues it announces these bytes first
//   (`mbarrier_arrive_expect_tx`). Behind a successful wait the data can be read as usual.
// - Stores complete in groups, in order: `bulk_store` any number of times, `bulk_commit`, then a wait by the *same*
//   thread. `bulk_wait_read<n>`: all but the last n groups have read shared memory, which may be reused; nothing is
//   said of the destination. `bulk_wait<n>`: they are written and visible to this thread; a release by it then
//   publishes them.
//
// Where plain accesses stand in front of a copy a proxy fence is needed, see `fence.cuh`: before a store, of what was
// written to shared memory; before a load, of what was read or written in its destination, or of what a peer wrote to
// its source by plain stores.
#pragma once

#include <deep_ep_core/ptx/cache_policy.cuh>
#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// Global to shared memory.
// cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes. PTX ISA: "Data Movement and Conversion
// Instructions: cp.async.bulk".
__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global, unsigned num_bytes,
                                          unsigned long long* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to_shared)),
                 "l"(global_address(from_global)), "r"(num_bytes), "r"(shared_address(barrier))
                 : "memory");
}

// The same with an L2 policy for the source.
// cp.async.bulk with .L2::cache_hint. PTX ISA: as above.
__device__ __forceinline__ void bulk_load(void* to_shared, const void* from_global, unsigned num_bytes,
                                          unsigned long long* barrier, CachePolicy policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(to_shared)),
        "l"(global_address(from_global)), "r"(num_bytes), "r"(shared_address(barrier)), "l"(policy.bits)
        : "memory");
}

// Shared to global memory, of this GPU or of a peer.
// cp.async.bulk.global.shared::cta.bulk_group. PTX ISA: as above.
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, unsigned num_bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global_address(to_global)),
                 "r"(shared_address(from_shared)), "r"(num_bytes)
                 : "memory");
}

// The same with an L2 policy for the destination.
// cp.async.bulk with .L2::cache_hint. PTX ISA: as above.
__device__ __forceinline__ void bulk_store(void* to_global, const void* from_shared, unsigned num_bytes,
                                           CachePolicy policy) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
                     global_address(to_global)),
                 "r"(shared_address(from_shared)), "r"(num_bytes), "l"(policy.bits)
                 : "memory");
}

// Closes the group of the stores that this thread has issued since the last one.
// cp.async.bulk.commit_group. PTX ISA: "...: cp.async.bulk.commit_group".
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but the last `kNumPending` groups of this thread are written and visible to it.
// cp.async.bulk.wait_group. PTX ISA: "...: cp.async.bulk.wait_group".
template <int kNumPending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kNumPending) : "memory");
}

// Waits until all but the last `kNumPending` groups of this thread have read their source.
// cp.async.bulk.wait_group.read. PTX ISA: as above.
template <int kNumPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumPending) : "memory");
}

}  // namespace deep_ep_core::ptx
