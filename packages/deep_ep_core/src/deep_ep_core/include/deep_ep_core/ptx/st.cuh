// Stores that take part in the memory model: relaxed and release, at GPU and system scope, to global memory.
//
// Called by one thread. `st_release` orders: what this thread did before it, and what it had seen of others (by an
// acquire, or by a barrier of its block), is visible to whoever reads the value with an acquire of the same scope.
// `st_relaxed` orders nothing, but is never torn.
#pragma once

#include <deep_ep_core/ptx/word.cuh>

namespace deep_ep_core::ptx {

// st.relaxed{.gpu,.sys}.global. PTX ISA: "Data Movement and Conversion Instructions: st".
template <Scope kScope, class T>
__device__ __forceinline__ void st_relaxed(T* pointer, T value) {
    static_assert(kIsWord<T>, "st_relaxed takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        const unsigned bits = static_cast<unsigned>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("st.relaxed.sys.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
        else
            asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
    } else {
        const unsigned long long bits = static_cast<unsigned long long>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
        else
            asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
    }
}

// st.release{.gpu,.sys}.global. PTX ISA: "Data Movement and Conversion Instructions: st".
template <Scope kScope, class T>
__device__ __forceinline__ void st_release(T* pointer, T value) {
    static_assert(kIsWord<T>, "st_release takes integers of 32 or 64 bits");
    const unsigned long long address = global_address(pointer);
    if constexpr (sizeof(T) == 4) {
        const unsigned bits = static_cast<unsigned>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
        else
            asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(bits) : "memory");
    } else {
        const unsigned long long bits = static_cast<unsigned long long>(value);
        if constexpr (kScope == Scope::kSys)
            asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
        else
            asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(address), "l"(bits) : "memory");
    }
}

// 16 bytes, as two words of 64 bits; each of them arrives whole, the pair may not. The address must be a multiple of
// 16.
// st.relaxed.sys.global.v2.b64. PTX ISA: "Data Movement and Conversion Instructions: st", and "Memory Consistency
// Model: Memory Operations on Vector Data Types".
__device__ __forceinline__ void st_relaxed_sys_v2(ulonglong2* pointer, ulonglong2 value) {
    asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(global_address(pointer)), "l"(value.x),
                 "l"(value.y)
                 : "memory");
}

// 16 bytes, as four words of 32 bits; the same holds of them.
// st.relaxed.sys.global.v4.b32. PTX ISA: as above.
__device__ __forceinline__ void st_relaxed_sys_v4(uint4* pointer, uint4 value) {
    asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global_address(pointer)), "r"(value.x),
                 "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}

}  // namespace deep_ep_core::ptx
