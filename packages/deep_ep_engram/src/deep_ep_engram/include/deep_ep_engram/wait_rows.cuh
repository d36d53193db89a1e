// The kernel that waits until what `get_rows` asked for is there. What comes after it in the stream may read the stage.
//
// Block b waits for context b, a thread for each rank. Mirrored in `deep_ep_engram.device.network_kernel`.
#pragma once

#include <deep_ep_core/comm/gin.cuh>

namespace deep_ep_engram {

struct WaitRowsParams {
    ncclDevComm dev_comm;
    deep_ep_core::comm::WaitParams wait;
    const unsigned* has_asked;          // as `get_rows` left it
    unsigned long long timeout_cycles;  // `wait.timeout_ns` in cycles of the SM's clock
    int num_ranks;
};

// The kernel's body. A rank whose entries do not come in time is in the record; the kernel ends all the same.
__device__ __forceinline__ void wait_rows(const WaitRowsParams& p) {
    namespace comm = deep_ep_core::comm;
    constexpr unsigned kOnlyPhase = 0;
    const ncclGin gin(p.dev_comm, static_cast<int>(blockIdx.x));
    const ncclTeam world = ncclTeamWorld(p.dev_comm);
    for (int peer = static_cast<int>(threadIdx.x); peer < p.num_ranks; peer += static_cast<int>(blockDim.x)) {
        if (p.has_asked[static_cast<long long>(blockIdx.x) * p.num_ranks + peer] == 0) continue;
        if (!comm::gin_wait_gets(gin, world, peer, p.timeout_cycles))
            comm::report_timeout(p.wait, kOnlyPhase, peer, 1, 0, p.wait.timeout_ns);
    }
}

}  // namespace deep_ep_engram
