// Memory barriers (mbarrier): counters in shared memory that threads and bulk copies arrive on.
//
// An mbarrier is 8 bytes of shared memory, aligned to 8. It counts phases; a phase ends when as many arrivals as it was
// initialised with, and all bytes that were announced for it, have come. Waiting is by parity: `mbarrier_try_wait(b,
// 0)` asks for the end of the first phase, 1 for that of the second, and so on in turn. A thread that waits for every
// phase cannot mistake one for another.
//
// The default order holds: an arrival is a release, a wait that succeeds an acquire, both between threads of the block.
#pragma once

#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// Called by one thread, followed by `fence_mbarrier_init` and a barrier of the block.
// mbarrier.init. PTX ISA: "Parallel Synchronization and Communication Instructions: mbarrier.init".
__device__ __forceinline__ void mbarrier_init(unsigned long long* barrier, unsigned num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_arrivals)
                 : "memory");
}

// Called by one thread when no thread and no copy uses it any more; its bytes may then serve another purpose.
// mbarrier.inval. PTX ISA: "...: mbarrier.inval".
__device__ __forceinline__ void mbarrier_inval(unsigned long long* barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival.
// mbarrier.arrive.release.cta. PTX ISA: "...: mbarrier.arrive".
__device__ __forceinline__ void mbarrier_arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival, which first announces bytes that copies will bring in this phase.
// mbarrier.arrive.expect_tx.release.cta. PTX ISA: "...: mbarrier.arrive".
__device__ __forceinline__ void mbarrier_arrive_expect_tx(unsigned long long* barrier, unsigned num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(num_bytes)
                 : "memory");
}

// The longest time that the hardware is asked to suspend a thread in `mbarrier_try_wait`, so that a loop around it sees
// its deadline. The thread is woken when the phase ends, so nothing is lost by more.
inline constexpr unsigned kSuspendNs = 10000;

// Whether the phase of this parity has ended. The hardware may suspend the thread first, for about `kSuspendNs`.
// A loop around it has no deadline: use `comm::wait_mbarrier`.
// mbarrier.try_wait.parity.acquire.cta. PTX ISA: "...: mbarrier.test_wait / mbarrier.try_wait".
__device__ __forceinline__ bool mbarrier_try_wait(unsigned long long* barrier, unsigned parity) {
    unsigned has_ended;
    asm volatile(
        "{\n"
        " .reg .pred has_ended;\n"
        " mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 has_ended, [%1], %2, %3;\n"
        " selp.u32 %0, 1, 0, has_ended;\n"
        "}"
        : "=r"(has_ended)
        : "r"(shared_address(barrier)), "r"(parity), "r"(kSuspendNs)
        : "memory");
    return has_ended != 0;
}

}  // namespace deep_ep_core::ptx
