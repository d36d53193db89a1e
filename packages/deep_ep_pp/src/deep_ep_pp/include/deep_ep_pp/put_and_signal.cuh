// What a message or a credit to a rank of another node takes of an SM: one thread, which asks the network and waits for
// nothing that a peer does.
//
// The put is from a stage in this rank's window of slots to a slot in the peer's; the signal adds 1 to a word of the
// peer's window of words, which its streams wait for.
#pragma once

#include <deep_ep_core/comm/gin.cuh>

namespace deep_ep_pp {

struct PutAndSignalParams {
    ncclDevComm dev_comm;
    ncclWindow_t slots;
    ncclWindow_t words;
    unsigned long long from_offset;  // bytes, in this rank's slots
    unsigned long long to_offset;    // bytes, in the peer's slots
    unsigned long long num_bytes;    // 0 for a signal alone
    unsigned long long word_offset;  // bytes, in the peer's words
    int peer;                        // rank in the group
};

// The only context that is used: a strong signal covers the puts of its own.
inline constexpr int kContext = 0;

// Sizes of 30 bits: networks take less than 2 GiB at once.
inline constexpr unsigned long long kMaxPutBytes = 1ull << 30;

// One thread.
//
// Order: behind what the stream did before, which the put reads. The signal is strong: who sees it sees all puts of this
// rank to the peer that were asked for before.
__device__ __forceinline__ void put_and_signal(const PutAndSignalParams& p) {
    namespace comm = deep_ep_core::comm;
    const ncclGin gin(p.dev_comm, kContext);
    const ncclTeam world = ncclTeamWorld(p.dev_comm);
    for (unsigned long long done = 0; done < p.num_bytes; done += kMaxPutBytes) {
        const unsigned long long rest = p.num_bytes - done;
        comm::gin_put(gin, world, p.peer, {p.slots, p.to_offset + done}, {p.slots, p.from_offset + done},
                      rest < kMaxPutBytes ? rest : kMaxPutBytes);
    }
    comm::gin_signal(gin, world, p.peer, ncclGin_StrongVASignalAdd{p.words, p.word_offset, 1});
}

}  // namespace deep_ep_pp
