// The low-latency combine inside one LSA team: as one kernel, or as two, between which no SM is used.
//
// `deep_ep_legacy.device.low_latency_kernels` mirrors the structs. Blocks of one kernel wait for each other and for
// those of the peers, so all must be resident at once. With no experts and no tokens it is a meeting of the ranks.
#pragma once

#include <deep_ep_legacy/low_latency/combine_receive.cuh>
#include <deep_ep_legacy/low_latency/combine_send.cuh>

namespace deep_ep_legacy::low_latency {

// The kernel's body, for blocks of `kNumThreads` threads, and dynamic shared memory for `num_experts + 1` integers.
template <CombineConfig kConfig>
__device__ __forceinline__ void combine(const CombineParams& p) {
    static_assert(kConfig.has_send || kConfig.has_receive);
    extern __shared__ __align__(16) int tables[];
    __shared__ Members members;
    unsigned long long epoch;
    if constexpr (kConfig.has_send) {
        epoch = p.call.state->num_sent + 1;
        return_rows<kConfig.is_logfmt>(p, epoch, members, tables);
    } else {
        epoch = *p.call.epoch;
    }
    if constexpr (kConfig.has_receive) sum_rows<kConfig.is_logfmt, kConfig.is_idx64>(p, epoch, members);
}

}  // namespace deep_ep_legacy::low_latency
