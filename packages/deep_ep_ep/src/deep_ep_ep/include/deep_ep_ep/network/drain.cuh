// Waits until the network has read all that this rank has put, so that its window may go.
#pragma once

#include <deep_ep_ep/network/gin_relay.cuh>

namespace deep_ep_ep {

inline constexpr int kDrainThreads = 128;
inline constexpr unsigned kPhaseDrain = 0;

struct DrainParams {
    Network net;
    int num_contexts;  // all that there are
};

struct DrainCall {
    GinAccess gin;
    DrainParams call;
};

// The kernel's body, for one block of `kDrainThreads`. A context that does not come to an end in time is in the record.
__device__ __forceinline__ void drain(const DrainCall& c) {
    const Network& net = c.call.net;
    for (int context = static_cast<int>(threadIdx.x); context < c.call.num_contexts; context += kDrainThreads) {
        const ncclGin gin(c.gin.dev_comm, context);
        const unsigned long long num_puts = net.num_puts[context];
        [[maybe_unused]] const bool is_done = comm::wait_until(
            net.wait, kPhaseDrain, own_rank(net), num_puts, [&gin, num_puts](unsigned long long& seen) {
                seen = gin.readCounter(0);
                return seen >= num_puts;
            });
    }
}

}  // namespace deep_ep_ep
