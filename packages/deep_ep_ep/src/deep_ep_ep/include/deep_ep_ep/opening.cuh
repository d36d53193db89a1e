// The opening of an operation: every rank tells every other what it was called with, and where its memory is.
//
// It does three things with one message of some words. The arguments on which ranks must agree are compared before
// anything moves, so that a wrong call is named and harms nobody. The offsets of the memory that peers will write to or
// read from are told, which each rank may choose freely. And the message says that this memory is free: the sender's
// stream has come to this operation.
//
// Slots are taken in turn by the epoch's parity; why two are enough is told in `comm/message.cuh`: each rank sends to
// all others in each epoch, and sends epoch e + 2 only when all have opened e + 1, so when all were done with e.
#pragma once

#include <deep_ep_core/comm/message.cuh>
#include <deep_ep_core/ptx/fence.cuh>
#include <deep_ep_ep/rank_state.cuh>

namespace deep_ep_ep {

inline constexpr int kNumAgreed = 12;                            // values of 32 bits, two a word
inline constexpr int kInvalidToken = 11;                         // the last of them is not compared, see `Opening`
inline constexpr int kNumPrivate = 2;                            // words that are not compared
inline constexpr int kNumOpeningWords = kNumAgreed / 2 + kNumPrivate;

// What a rank opens an operation with. Mirrored in `deep_ep_ep.device.opening`, which names the agreed values.
struct Opening {
    // The last one is 0 here; the device sends 1 + a token whose topk_idx is wrong, if there is one, in its place.
    unsigned agreed[kNumAgreed];
    unsigned long long told[kNumPrivate];
};

// The slots of openings in each rank's window: by the epoch's parity and the sender.
struct OpeningSlots {
    comm::Message words[2][comm::kMaxLsaRanks][kNumOpeningWords];
};

// What the peers told, in shared memory.
struct PeerOpenings {
    unsigned long long told[comm::kMaxLsaRanks][kNumPrivate];
};

// Sends this rank's opening to all ranks of the team, this one included. Called by all threads of one block.
//
// Order: what this rank's stream and, before a barrier of the block, the threads of this block did is visible to
// whoever has received the opening.
__device__ __forceinline__ void send_opening(const comm::LsaTeam& team, unsigned long long slots_offset,
                                             const Opening& opening, unsigned long long epoch,
                                             unsigned invalid_token = 0) {
    const int num_words = team.num_ranks * kNumOpeningWords;
    if (static_cast<int>(threadIdx.x) < num_words) ptx::fence_acq_rel<ptx::Scope::kSys>();
    for (int i = static_cast<int>(threadIdx.x); i < num_words; i += static_cast<int>(blockDim.x)) {
        const int peer = i / kNumOpeningWords, word = i % kNumOpeningWords;
        constexpr int kNumAgreedWords = kNumAgreed / 2;
        unsigned long long payload;
        if (word < kNumAgreedWords) {
            const unsigned high = 2 * word + 1 == kInvalidToken ? invalid_token : opening.agreed[2 * word + 1];
            payload = opening.agreed[2 * word] | static_cast<unsigned long long>(high) << 32;
        } else
            payload = opening.told[word - kNumAgreedWords];
        OpeningSlots* slots = comm::window_pointer<OpeningSlots>(team, peer, slots_offset);
        comm::send_message(&slots->words[epoch % 2][team.rank][word], payload, epoch);
    }
}

// Receives the openings of all ranks and compares them with this rank's. Called by all threads of each block.
//
// Returns, in all threads of the block alike and in all blocks alike, whether all have come and agree; if not, that is
// in the record. Order: an acquire of what the senders released, for all threads of the block; bulk copies behind it
// need `ptx::fence_proxy_async_global`, by the threads that issue them.
[[nodiscard]] __device__ __forceinline__ bool receive_openings(const comm::LsaTeam& team,
                                                               unsigned long long slots_offset,
                                                               const Opening& opening, unsigned long long epoch,
                                                               const comm::WaitParams& wait, PeerOpenings& peers) {
    const OpeningSlots* slots = comm::window_pointer<OpeningSlots>(team, team.rank, slots_offset);
    constexpr int kNumAgreedWords = kNumAgreed / 2;
    const int num_words = team.num_ranks * kNumOpeningWords;
    bool is_right = true;
    for (int i = static_cast<int>(threadIdx.x); i < num_words; i += static_cast<int>(blockDim.x)) {
        const int lsa_peer = i / kNumOpeningWords, word = i % kNumOpeningWords;
        const int peer = comm::group_rank(team, lsa_peer);
        const comm::ReceivedMessage message =
            comm::wait_message(&slots->words[epoch % 2][lsa_peer][word], epoch, wait, kPhaseOpen, peer);
        if (!message.has_come) {
            is_right = false;
            break;
        }
        if (word >= kNumAgreedWords) {
            peers.told[lsa_peer][word - kNumAgreedWords] = message.payload;
            continue;
        }
        for (int half = 0; half < 2; ++half) {
            const unsigned theirs = static_cast<unsigned>(message.payload >> (32 * half));
            const int value_idx = 2 * word + half;
            const unsigned ours = opening.agreed[value_idx];
            if (theirs == ours) continue;
            // The place of the value stands where a wait would tell its length.
            const unsigned phase_idx = value_idx == kInvalidToken ? kPhaseInvalid : kPhaseDisagree;
            comm::report_timeout(wait, phase_idx, peer, ours, theirs, value_idx);
            is_right = false;
        }
    }
    if (static_cast<int>(threadIdx.x) < num_words) ptx::fence_acq_rel<ptx::Scope::kSys>();
    return __syncthreads_and(is_right) != 0;
}

}  // namespace deep_ep_ep
