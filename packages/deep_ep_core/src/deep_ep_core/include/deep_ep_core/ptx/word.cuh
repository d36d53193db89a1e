// What the memory accesses of this folder share: scopes, the types they take, and addresses.
#pragma once

namespace deep_ep_core::ptx {

// The threads between which an access orders others. PTX ISA: "Memory Consistency Model: Scope".
enum class Scope : int {
    kGpu = 0,  // all threads on this GPU
    kSys = 1,  // all threads on all GPUs, and those of the host
};

// The types that scalar accesses take: integers of 32 and 64 bits. An access of that size to an address that is a
// multiple of it is never torn, provided that no other access to those bytes has another size (PTX ISA: "Memory
// Consistency Model: Limitations on Mixed-size Data-races").
template <class T>
inline constexpr bool kIsWord = false;
template <>
inline constexpr bool kIsWord<int> = true;
template <>
inline constexpr bool kIsWord<unsigned> = true;
template <>
inline constexpr bool kIsWord<long> = sizeof(long) == 8;
template <>
inline constexpr bool kIsWord<unsigned long> = sizeof(unsigned long) == 8;
template <>
inline constexpr bool kIsWord<long long> = true;
template <>
inline constexpr bool kIsWord<unsigned long long> = true;

// An address in the .global state space: of this GPU, a peer, or pinned host memory.
// cvta.to.global. PTX ISA: "Data Movement and Conversion Instructions: cvta".
__device__ __forceinline__ unsigned long long global_address(const void* pointer) {
    return __cvta_generic_to_global(pointer);
}

// An address in the .shared::cta state space, which is also one in the .shared::cluster window.
// cvta.to.shared. PTX ISA: "Data Movement and Conversion Instructions: cvta".
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

}  // namespace deep_ep_core::ptx
