// The end of a buffer that used the network: waits until what this rank asked for has left it.
#pragma once

#include <deep_ep_core/comm/gin.cuh>

#include <deep_ep_pp/put_and_signal.cuh>

namespace deep_ep_pp {

struct DrainParams {
    ncclDevComm dev_comm;
    unsigned long long timeout_cycles;  // of the SM's clock; NCCL heeds it since 2.31
};

// One thread. Credits carry nothing that a peer would answer, so only this tells that they are on their way.
__device__ __forceinline__ void drain(const DrainParams& p) {
    const ncclGin gin(p.dev_comm, kContext);
    [[maybe_unused]] const bool is_drained =
        deep_ep_core::comm::gin_flush(gin, p.timeout_cycles, ncclCoopThread{});
}

}  // namespace deep_ep_pp
