// Messages: 64 bits of payload and the epoch they belong to in one 16-byte store, so that neither side needs a fence.
//
// PTX promises that a word of 64 bits is never torn, and no more: a 16-byte access counts as two such words, which may
// arrive in either order, also if both are written by one instruction. So each word carries half of the payload and its
// own stamp, the low 32 bits of the epoch, and the reader takes the message when both stamps are right. Nothing else
// has to be ordered, because what is read is in the very word that was polled.
//
// A message orders nothing else. Where it must also stand for "what I did before is visible", the sender runs
// `ptx::fence_acq_rel<Scope::kSys>` before it sends (one fence for messages to all peers), and the reader runs the same
// fence after its messages have come: the pair makes a release and an acquire.
//
// Stamps are compared for equality. So a slot must not be overwritten before it was read, and must be written in every
// epoch (or it might match one 2^32 epochs later). Two slots, taken in turn by epoch % 2, are enough where every rank
// sends to every other in each epoch: a rank that sends epoch e + 2 has had the messages of e + 1, and its peers sent
// those when they were done with e. The epoch must be kept on the device, so that a CUDA graph that is replayed goes on
// counting.
#pragma once

#include <deep_ep_core/comm/deadline.cuh>

namespace deep_ep_core::comm {

// A slot for one message: all zero before the first epoch, which is 1. In the memory of the rank that reads it.
struct alignas(16) Message {
    unsigned long long low;   // bits 0 to 31 of the payload; above them the stamp
    unsigned long long high;  // bits 32 to 63 of the payload; above them the stamp
};

// What `wait_message` found.
struct ReceivedMessage {
    bool has_come;               // false: it did not come in time, and there is no payload
    unsigned long long payload;
};

// Writes a message into a slot of any rank. Called by one thread, the only one that writes this slot.
__device__ __forceinline__ void send_message(Message* slot, unsigned long long payload, unsigned long long epoch) {
    const unsigned long long stamp = epoch << 32;
    ptx::st_relaxed_sys_v2(reinterpret_cast<ulonglong2*>(slot),
                           ulonglong2{stamp | (payload & 0xffffffffull), stamp | (payload >> 32)});
}

// Waits for the message of an epoch. Called by one thread; see `wait_until` for the last three arguments. A report
// shows stamps, not epochs.
[[nodiscard]] __device__ __forceinline__ ReceivedMessage wait_message(const Message* slot, unsigned long long epoch,
                                                                      const WaitParams& wait, unsigned phase_idx,
                                                                      int peer) {
    const unsigned long long stamp = epoch & 0xffffffffull;
    ulonglong2 words{0, 0};
    const bool has_come = wait_until(wait, phase_idx, peer, stamp, [slot, stamp, &words](unsigned long long& seen) {
        words = ptx::ld_relaxed_sys_v2(reinterpret_cast<const ulonglong2*>(slot));
        const unsigned long long low_stamp = words.x >> 32, high_stamp = words.y >> 32;
        seen = low_stamp == stamp ? high_stamp : low_stamp;
        return seen == stamp;
    });
    return ReceivedMessage{has_come, (words.x & 0xffffffffull) | (words.y << 32)};
}

}  // namespace deep_ep_core::comm
