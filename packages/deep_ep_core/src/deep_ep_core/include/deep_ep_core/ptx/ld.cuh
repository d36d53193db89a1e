// Loads that take part in the memory model: relaxed and acquire, at GPU and system scope, from global memory.
//
// Called by one thread. `ld_acquire` orders: what the writer did before the release that this load reads from is
// visible to what this thread does after the load. `ld_relaxed` orders nothing, but is never torn and never served from
// a stale cache line, which a plain load may be.
//
// All accesses of this folder are volatile with a memory clobber: the compiler neither drops nor moves them, nor keeps
// values of plain variables in registers across them.
#pragma once

#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// ld.relaxed{.gpu,.sys}.global. PTX ISA: "Data Movement and Conversion Instructions: ld".
template <Scope kScope, class T>
__device__ __forceinline__ T ld_relaxed(const T* pointer) {
    static_assert(kIsWord<T>, "ld_relaxed takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        unsigned value;
        if constexpr (kScope == Scope::kSys)
            asm volatile("ld.relaxed.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
        else
            asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
        return static_cast<T>(value);
    } else {
        unsigned long long value;
        if constexpr (kScope == Scope::kSys)
            asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
        else
            asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
        return static_cast<T>(value);
    }
}

// ld.acquire{.gpu,.sys}.global. PTX ISA: "Data Movement and Conversion Instructions: ld".
template <Scope kScope, class T>
__device__ __forceinline__ T ld_acquire(const T* pointer) {
    static_assert(kIsWord<T>, "ld_acquire takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        unsigned value;
        if constexpr (kScope == Scope::kSys)
            asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
        else
            asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
        return static_cast<T>(value);
    } else {
        unsigned long long value;
        if constexpr (kScope == Scope::kSys)
            asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
        else
            asm volatile("ld.acquire.gpu.global.b64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
        return static_cast<T>(value);
    }
}

// 16 bytes, as two words of 64 bits. The memory model takes a vector access for one access an element, in any order:
// each of the two words is whole, the pair need not be. The address must be a multiple of 16.
// ld.relaxed.sys.global.v2.b64. PTX ISA: "Data Movement and Conversion Instructions: ld", and "Memory Consistency
// Model: Memory Operations on Vector Data Types".
__device__ __forceinline__ ulonglong2 ld_relaxed_sys_v2(const ulonglong2* pointer) {
    ulonglong2 value;
    asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];"
                 : "=l"(value.x), "=l"(value.y)
                 : "l"(global_address(pointer))
                 : "memory");
    return value;
}

// 16 bytes, as four words of 32 bits; the same holds of them.
// ld.relaxed.sys.global.v4.b32. PTX ISA: as above.
__device__ __forceinline__ uint4 ld_relaxed_sys_v4(const uint4* pointer) {
    uint4 value;
    asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(global_address(pointer))
                 : "memory");
    return value;
}

}  // namespace deep_ep_core::ptx
