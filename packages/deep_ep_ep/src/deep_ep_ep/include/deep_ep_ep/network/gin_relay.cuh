// GIN as the kernels across nodes use it: puts to relays, each with a strong signal, and waits for such signals.
//
// Signals are words of the window, since numbered ones may be different words in each context. Such a signal is a
// message of its own behind the put, so it must be strong: a weak one would vouch for no put at all.
#pragma once

#include <deep_ep_core/comm/gin.cuh>
#include <deep_ep_ep/network/network.cuh>

namespace deep_ep_ep {

// The device communicator and the window, which all kernels with GIN are passed first.
struct GinAccess {
    ncclDevComm dev_comm;
    ncclWindow_t window;
};

// The team in which relays have their numbers as ranks.
__device__ __forceinline__ ncclTeam relay_team(const GinAccess& access, const Network& net) {
    return net.is_hybrid ? ncclTeamRail(access.dev_comm) : ncclTeamWorld(access.dev_comm);
}

// Puts bytes of this rank's window to a rank of a team, and raises a word of it by 1. Called by all threads of `coop`.
//
// A counter tells when the network has read the bytes. Only the closing of a buffer needs it (`drain.cuh`): in between,
// who opens an operation has received all of the last one.
template <class Coop>
__device__ __forceinline__ void put_and_signal(const GinAccess& access, const Network& net, long long put_idx,
                                               const ncclTeam& team, int peer, unsigned long long to_offset,
                                               unsigned long long from_offset, unsigned long long num_bytes,
                                               NetworkWord word, Coop coop) {
    const int context = static_cast<int>(put_idx % net.num_contexts);
    const ncclGin gin(access.dev_comm, context);
    comm::gin_put(gin, team, peer, {access.window, to_offset}, {access.window, from_offset}, num_bytes,
                  ncclGin_StrongVASignalInc{access.window, word_offset(net, word, own_rank(net))},
                  ncclGin_WeakCounterInc{0}, coop);
    if (coop.thread_rank() == 0) atomicAdd(&net.num_puts[context], 1ull);
}

// The same to a relay.
template <class Coop>
__device__ __forceinline__ void put_to_relay(const GinAccess& access, const Network& net, long long put_idx, int relay,
                                             unsigned long long to_offset, unsigned long long from_offset,
                                             unsigned long long num_bytes, NetworkWord word, Coop coop) {
    put_and_signal(access, net, put_idx, relay_team(access, net), relay, to_offset, from_offset, num_bytes, word, coop);
}

// Waits until a rank has raised its word here to a value. Called by one thread; an acquire at system scope.
[[nodiscard]] __device__ __forceinline__ bool wait_for_puts(const GinAccess& access, const Network& net,
                                                            NetworkWord word, int rank, unsigned long long least,
                                                            unsigned phase_idx) {
    const ncclGin gin(access.dev_comm, 0);
    return comm::gin_wait_signal(gin, comm::GinPlace{access.window, word_offset(net, word, rank)}, least, net.wait,
                                 phase_idx, rank);
}

}  // namespace deep_ep_ep
