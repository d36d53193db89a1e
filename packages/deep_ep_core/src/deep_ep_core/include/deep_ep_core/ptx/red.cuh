// Atomic additions without a result to global memory, at GPU and system scope; the sender does not wait for them.
//
// Called by one thread. As in `atom.cuh`, not for host memory. What a `red` reads is no acquire: a thread that must see
// what the others wrote uses `atom_add_acq_rel`, or loads the word with an acquire.
#pragma once

#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// Adds; orders nothing.
// red.relaxed{.gpu,.sys}.global.add. PTX ISA: "Parallel Synchronization and Communication Instructions: red".
template <Scope kScope, class T>
__device__ __forceinline__ void red_add_relaxed(T* pointer, T value) {
    static_assert(kIsWord<T>, "red_add_relaxed takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        const unsigned bits = static_cast<unsigned>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("red.relaxed.sys.global.add.u32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
        else
            asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
    } else {
        const unsigned long long bits = static_cast<unsigned long long>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("red.relaxed.sys.global.add.u64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
        else
            asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
    }
}

// Adds; a release of what this thread did and saw before. Additions of several threads chain: a reader that acquires
// the sum has seen what all of them wrote (PTX ISA: "Memory Consistency Model: Observation Order").
// red.release{.gpu,.sys}.global.add. PTX ISA: as above.
template <Scope kScope, class T>
__device__ __forceinline__ void red_add_release(T* pointer, T value) {
    static_assert(kIsWord<T>, "red_add_release takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        const unsigned bits = static_cast<unsigned>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("red.release.sys.global.add.u32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
        else
            asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
    } else {
        const unsigned long long bits = static_cast<unsigned long long>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("red.release.sys.global.add.u64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
        else
            asm volatile("red.release.gpu.global.add.u64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
    }
}

}  // namespace deep_ep_core::ptx
