// The low-latency dispatch inside one LSA team: as one kernel, or as two, between which no SM is used.
//
// `deep_ep_legacy.device.low_latency_kernels` mirrors the structs. Blocks of one kernel wait for each other and for
// those of the peers, so all must be resident at once.
#pragma once

#include <deep_ep_legacy/low_latency/dispatch_receive.cuh>
#include <deep_ep_legacy/low_latency/dispatch_send.cuh>

namespace deep_ep_legacy::low_latency {

// The kernel's body, for blocks of `kNumThreads` threads, and dynamic shared memory for `2 * num_experts + 1` integers.
template <DispatchConfig kConfig>
__device__ __forceinline__ void dispatch(const DispatchParams& p) {
    static_assert(kConfig.has_send || kConfig.has_receive);
    extern __shared__ __align__(16) int tables[];
    __shared__ Members members;
    unsigned long long epoch;
    if constexpr (kConfig.has_send) {
        epoch = p.call.state->num_sent + 1;
        send_rows<kConfig.is_fp8, kConfig.is_idx64>(p, epoch, members, tables);
    } else {
        epoch = *p.call.epoch;
    }
    if constexpr (kConfig.has_receive) receive_rows<kConfig.is_fp8>(p, epoch, members, tables);
}

}  // namespace deep_ep_legacy::low_latency
