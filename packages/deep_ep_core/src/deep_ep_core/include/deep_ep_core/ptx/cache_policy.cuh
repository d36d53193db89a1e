// L2 cache policies, as bulk copies take them.
//
// Called by one thread, once; the policy is a value in a register.
#pragma once

namespace deep_ep_core::ptx {

// An opaque policy of `createpolicy`.
struct CachePolicy {
    unsigned long long bits;
};

// For what is read or written once and not touched again: first to leave L2.
// createpolicy.fractional.L2::evict_first. PTX ISA: "Data Movement and Conversion Instructions: createpolicy".
__device__ __forceinline__ CachePolicy evict_first_policy() {
    CachePolicy policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy.bits));
    return policy;
}

// The order of an access without a policy.
// createpolicy.fractional.L2::evict_normal. PTX ISA: as above.
__device__ __forceinline__ CachePolicy evict_normal_policy() {
    CachePolicy policy;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy.bits));
    return policy;
}

// For what will be read again soon: last to leave L2.
// createpolicy.fractional.L2::evict_last. PTX ISA: as above.
__device__ __forceinline__ CachePolicy evict_last_policy() {
    CachePolicy policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy.bits));
    return policy;
}

}  // namespace deep_ep_core::ptx
