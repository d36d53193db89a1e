// The network between nodes, as kernels use it: NCCL's GIN by its public functions alone, so that every backend will do
// (a proxy thread, GDAKI, GPI, the loopback network).
//
// These functions take over what all callers would repeat: the places, and waits that end at a deadline. What they do
// not hide is the strength of a signal, since correctness hangs on it, and each use says it by its type:
//
//   ncclGin_StrongSignalInc/Add, ncclGin_StrongVASignalInc/Add: who sees it sees all earlier puts of this context to
//     this peer.
//   ncclGin_WeakSignalInc/Add, ncclGin_WeakVASignalInc/Add: who sees it sees the put that it rides on, and no other.
//
// Without a signal nothing says that data has arrived: neither a counter nor a flush, which only give the source back.
// The device communicator must have been asked for the kinds that are used (`deep_ep_core.nccl.GinConfig`).
//
// Puts, gets and signals may wait for a free place in the queue of the context, without a deadline: NCCL has none there.
// Only nvcc compiles this header, with NCCL's include directory; kernels must be compiled with the headers of the NCCL
// that runs.
#pragma once

#include <nccl_device.h>

#include <deep_ep_core/comm/deadline.cuh>

namespace deep_ep_core::comm {

// A place in a window, the same window on the other rank where that is meant.
struct GinPlace {
    ncclWindow_t window;
    unsigned long long offset;  // bytes
};

// Writes `num_bytes` of this rank to a peer. Called by all threads of `coop` together.
//
// Order: what the calling threads wrote to the source before is what arrives; the source must stay as it is until a
// counter or a flush gives it back.
//
// peer: rank in `team`.
// remote: the signal that says that the data has arrived, or nothing.
// local: `ncclGin_WeakCounterInc`, which says that the source may be used again, or nothing.
template <class Remote = ncclGin_None, class Local = ncclGin_None, class Coop = ncclCoopThread>
__device__ __forceinline__ void gin_put(const ncclGin& gin, const ncclTeam& team, int peer, const GinPlace& to,
                                        const GinPlace& from, unsigned long long num_bytes, Remote remote = {},
                                        Local local = {}, Coop coop = {}) {
    gin.put(team, peer, to.window, to.offset, from.window, from.offset, num_bytes, remote, local, coop);
}

// Writes a value of up to 8 bytes to a peer; it needs no place of this rank. Called by all threads of `coop` together.
template <class T, class Remote = ncclGin_None, class Coop = ncclCoopThread>
__device__ __forceinline__ void gin_put_value(const ncclGin& gin, const ncclTeam& team, int peer, const GinPlace& to,
                                              T value, Remote remote = {}, Coop coop = {}) {
    static_assert(sizeof(T) <= 8, "a value must fit into a descriptor");
    gin.putValue(team, peer, to.window, to.offset, value, remote, coop);
}

// Signals a peer without a put of its own. Called by all threads of `coop` together.
template <class Remote, class Coop = ncclCoopThread>
__device__ __forceinline__ void gin_signal(const ncclGin& gin, const ncclTeam& team, int peer, Remote remote,
                                           Coop coop = {}) {
    gin.signal(team, peer, remote, coop);
}

// Waits until a signal of this rank is at least `least`. Called by one thread. An acquire at system scope: what the
// signal vouches for is visible to this thread afterwards, and behind a barrier of the block to the others.
//
// peer: the rank that should signal, in the group, for the report. See `wait_until` for `wait` and `phase_idx`.
//
// Returns false if it did not come in time.
[[nodiscard]] __device__ __forceinline__ bool gin_wait_signal(const ncclGin& gin, ncclGinSignal_t signal,
                                                              unsigned long long least, const WaitParams& wait,
                                                              unsigned phase_idx, int peer) {
    return wait_until(wait, phase_idx, peer, least, [&gin, signal, least](unsigned long long& seen) {
        seen = gin.readSignal(signal);
        return seen >= least;
    });
}

// The same for a signal that is a word of this rank's window.
[[nodiscard]] __device__ __forceinline__ bool gin_wait_signal(const ncclGin& gin, const GinPlace& word,
                                                              unsigned long long least, const WaitParams& wait,
                                                              unsigned phase_idx, int peer) {
    return wait_until(wait, phase_idx, peer, least, [&gin, &word, least](unsigned long long& seen) {
        seen = gin.readSignal(word.window, word.offset);
        return seen >= least;
    });
}

// Reads `num_bytes` of a peer into this rank; `gin_wait_gets` says when they are there. Called by all threads of `coop`
// together. Not every backend can (EFA can't).
template <class Coop = ncclCoopThread>
__device__ __forceinline__ void gin_get(const ncclGin& gin, const ncclTeam& team, int peer, const GinPlace& remote,
                                        const GinPlace& local, unsigned long long num_bytes, Coop coop = {}) {
    gin.get(team, peer, remote.window, remote.offset, local.window, local.offset, num_bytes, coop);
}

// Waits until what this context got from a peer is there, and the sources of its puts to that peer may be used again.
// Called by all threads of `coop` together. An acquire.
//
// timeout_cycles: when to give up, in cycles of the SM's clock. NCCL has had such a wait since 2.31; with an older one
//   this waits for ever.
//
// Returns false if it did not end in time.
template <class Coop = ncclCoopThread>
[[nodiscard]] __device__ __forceinline__ bool gin_wait_gets(const ncclGin& gin, const ncclTeam& team, int peer,
                                                            unsigned long long timeout_cycles, Coop coop = {}) {
    ncclGinRequest_t request;
    gin.flushAsync(team, peer, &request, coop);
    if constexpr (requires { gin.wait(request, coop, ncclGin_None{}, cuda::memory_order_acquire, timeout_cycles); }) {
        return gin.wait(request, coop, ncclGin_None{}, cuda::memory_order_acquire, timeout_cycles) == ncclSuccess;
    } else {
        gin.wait(request, coop);
        return true;
    }
}

// Waits until the sources of all puts of this context may be used again. It does not say that anything has arrived.
// Called by all threads of `coop` together.
//
// timeout_cycles: see `gin_wait_gets`.
//
// Returns false if it did not end in time.
template <class Coop>
[[nodiscard]] __device__ __forceinline__ bool gin_flush(const ncclGin& gin, unsigned long long timeout_cycles,
                                                        Coop coop) {
    if constexpr (requires { gin.flush(coop, cuda::memory_order_acquire, ncclGin_None{}, timeout_cycles); }) {
        return gin.flush(coop, cuda::memory_order_acquire, ncclGin_None{}, timeout_cycles) == ncclSuccess;
    } else {
        gin.flush(coop);
        return true;
    }
}

}  // namespace deep_ep_core::comm
