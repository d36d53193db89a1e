// Atomic additions and compare-and-swap on global memory, at GPU and system scope.
//
// Called by one thread. On words in a peer's memory they need NVLink or PCIe atomics. On host memory some machines do
// not perform them atomically (PTX ISA: "Limitations on atomicity at system scope"), so nothing here is used on it.
// Addition wraps; a signed type gives the same bits.
#pragma once

#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// Adds and returns what was there; orders nothing.
// atom.relaxed{.gpu,.sys}.global.add. PTX ISA: "Parallel Synchronization and Communication Instructions: atom".
template <Scope kScope, class T>
__device__ __forceinline__ T atom_add_relaxed(T* pointer, T value) {
    static_assert(kIsWord<T>, "atom_add_relaxed takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        unsigned old;
        const unsigned bits = static_cast<unsigned>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("atom.relaxed.sys.global.add.u32 %0, [%1], %2;"
                         : "=r"(old)
                         : "l"(address), "r"(bits)
                         : "memory");
        else
            asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;"
                         : "=r"(old)
                         : "l"(address), "r"(bits)
                         : "memory");
        return static_cast<T>(old);
    } else {
        unsigned long long old;
        const unsigned long long bits = static_cast<unsigned long long>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("atom.relaxed.sys.global.add.u64 %0, [%1], %2;"
                         : "=l"(old)
                         : "l"(address), "l"(bits)
                         : "memory");
        else
            asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], %2;"
                         : "=l"(old)
                         : "l"(address), "l"(bits)
                         : "memory");
        return static_cast<T>(old);
    }
}

// Adds and returns what was there; a release of what came before and an acquire for what comes after. The last of n
// blocks that add to one word this way has seen what all of them wrote.
// atom.acq_rel{.gpu,.sys}.global.add. PTX ISA: as above.
template <Scope kScope, class T>
__device__ __forceinline__ T atom_add_acq_rel(T* pointer, T value) {
    static_assert(kIsWord<T>, "atom_add_acq_rel takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        unsigned old;
        const unsigned bits = static_cast<unsigned>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("atom.acq_rel.sys.global.add.u32 %0, [%1], %2;"
                         : "=r"(old)
                         : "l"(address), "r"(bits)
                         : "memory");
        else
            asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
                         : "=r"(old)
                         : "l"(address), "r"(bits)
                         : "memory");
        return static_cast<T>(old);
    } else {
        unsigned long long old;
        const unsigned long long bits = static_cast<unsigned long long>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("atom.acq_rel.sys.global.add.u64 %0, [%1], %2;"
                         : "=l"(old)
                         : "l"(address), "l"(bits)
                         : "memory");
        else
            asm volatile("atom.acq_rel.gpu.global.add.u64 %0, [%1], %2;"
                         : "=l"(old)
                         : "l"(address), "l"(bits)
                         : "memory");
        return static_cast<T>(old);
    }
}

// Writes `desired` if `expected` is there; returns what was there. Orders nothing.
// atom.relaxed{.gpu,.sys}.global.cas. PTX ISA: as above.
template <Scope kScope, class T>
__device__ __forceinline__ T atom_cas_relaxed(T* pointer, T expected, T desired) {
    static_assert(kIsWord<T>, "atom_cas_relaxed takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        unsigned old;
        const unsigned compare = static_cast<unsigned>(expected), bits = static_cast<unsigned>(desired);
        if constexpr (kScope == Scope::kSys)
            asm volatile("atom.relaxed.sys.global.cas.b32 %0, [%1], %2, %3;"
                         : "=r"(old)
                         : "l"(address), "r"(compare), "r"(bits)
                         : "memory");
        else
            asm volatile("atom.relaxed.gpu.global.cas.b32 %0, [%1], %2, %3;"
                         : "=r"(old)
                         : "l"(address), "r"(compare), "r"(bits)
                         : "memory");
        return static_cast<T>(old);
    } else {
        unsigned long long old;
        const unsigned long long compare = static_cast<unsigned long long>(expected);
        const unsigned long long bits = static_cast<unsigned long long>(desired);
        if constexpr (kScope == Scope::kSys)
            asm volatile("atom.relaxed.sys.global.cas.b64 %0, [%1], %2, %3;"
                         : "=l"(old)
                         : "l"(address), "l"(compare), "l"(bits)
                         : "memory");
        else
            asm volatile("atom.relaxed.gpu.global.cas.b64 %0, [%1], %2, %3;"
                         : "=l"(old)
                         : "l"(address), "l"(compare), "l"(bits)
                         : "memory");
        return static_cast<T>(old);
    }
}

}  // namespace deep_ep_core::ptx
