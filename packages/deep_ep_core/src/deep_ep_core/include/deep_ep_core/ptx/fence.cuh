// Fences: between threads, and between the ways of reaching memory (proxies).
//
// Called by one thread; a fence says nothing of what other threads of the block did, unless a barrier of the block
// stands between. Plain loads, stores and atomics go through the generic proxy, bulk copies through the async proxy. An
// access of one proxy and an access of the other to the same bytes, in whatever order and even by one thread, need a
// proxy fence between them. Two cases need none: the completion of a bulk copy brings its own fence, so that generic
// accesses behind the wait for it are right; and the end of a kernel orders all proxies before the next kernel in its
// stream.
#pragma once

#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// Release and acquire at once: with a relaxed store behind it, it releases; behind a relaxed load, it acquires. One
// fence serves any number of stores or loads.
// fence.acq_rel{.gpu,.sys}. PTX ISA: "Parallel Synchronization and Communication Instructions: membar / fence".
template <Scope kScope>
__device__ __forceinline__ void fence_acq_rel() {
    if constexpr (kScope == Scope::kSys)
        asm volatile("fence.acq_rel.sys;" ::: "memory");
    else
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// Between generic accesses and bulk copies, of shared and global memory.
// fence.proxy.async. PTX ISA: as above.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same for global memory only: behind the acquire of what another thread, here or on a peer, did by plain accesses,
// and before a bulk copy that touches the same bytes. The thread that issues the copy runs it.
// fence.proxy.async.global. PTX ISA: as above.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// The same for shared memory only: between plain stores and the bulk copy that reads what they wrote, or between plain
// loads and the bulk copy that overwrites what they read. Each thread that made such accesses runs it, before the
// barrier behind which the copy is issued.
// fence.proxy.async.shared::cta. PTX ISA: as above.
__device__ __forceinline__ void fence_proxy_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Makes the initialisation of mbarriers visible to the copies that will complete on them. The thread that initialised
// them runs it, before the barrier behind which others use them.
// fence.mbarrier_init.release.cluster. PTX ISA: as above.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

}  // namespace deep_ep_core::ptx
