// The opening of an operation: every rank tells every other what it was called with, before anything moves.
//
// The arguments on which ranks must agree are compared, so that a wrong call is named and harms nobody; the others are
// told. Slots are taken in turn by the epoch's parity; why two are enough is told in `comm/message.cuh`: each rank
// sends to all others in each epoch, and sends epoch e + 2 only when all have opened e + 1, so when all were done with
// e.
#pragma once

#include <deep_ep_core/comm/message.cuh>
#include <deep_ep_core/ptx/fence.cuh>
#include <deep_ep_legacy/normal/rank_state.cuh>

namespace deep_ep_legacy::normal {

inline constexpr int kNumAgreed = 10;          // values of 32 bits, two a word
inline constexpr int kHandle = kNumAgreed - 1;  // the last of them, filled in by the device: a digest of the handle
inline constexpr int kNumAgreedWords = kNumAgreed / 2;
inline constexpr int kNumOpeningWords = kNumAgreedWords + 1;

// What a rank opens an operation with. Mirrored in `deep_ep_legacy.device.normal_kernels`.
struct Opening {
    unsigned agreed[kNumAgreed];
    unsigned num_tokens;        // tokens of this rank
    unsigned num_worst_tokens;  // rows that its results have room for; 0: as many as come
};

// The slots of openings in each rank's window: by the epoch's parity and the sender.
struct OpeningSlots {
    comm::Message words[2][comm::kMaxLsaRanks][kNumOpeningWords];
};

// What the ranks told, in shared memory.
struct PeerOpenings {
    int num_tokens[comm::kMaxLsaRanks];
    unsigned num_worst_tokens[comm::kMaxLsaRanks];
    unsigned first_difference;  // 128 times the place of the value, and the rank it differs on
    unsigned digest;
};

// A number for the counts of a routing, the same on all ranks for the handles of one dispatch. Called by all threads of
// a block; the same in all of them.
__device__ __forceinline__ unsigned handle_digest(const int* rank_prefix_matrix, int num_ranks, PeerOpenings& peers) {
    if (threadIdx.x == 0) peers.digest = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < num_ranks * num_ranks; i += kNumThreads) {
        // Any mixing will do, as long as it knows the place of each count.
        unsigned word = static_cast<unsigned>(rank_prefix_matrix[i]) * 0x9e3779b1u + static_cast<unsigned>(i);
        word = (word ^ word >> 15) * 0x2c1b3c6du;
        atomicAdd(&peers.digest, word ^ word >> 12);
    }
    __syncthreads();
    return peers.digest;
}

__device__ __forceinline__ unsigned agreed_value(const Opening& opening, int idx, unsigned digest) {
    return idx == kHandle ? digest : opening.agreed[idx];
}

// Whether the operation may be opened: not behind a failure of which the host has not heard yet. The hosts of the ranks
// hear of it before different calls, and a call of which a host has heard launches nothing. So an operation behind a
// failure sends nothing and counts for nothing, and the ranks' epochs stay alike. Called by all threads of a block; the
// answer of the first block holds for the operation. Another block may see a failure that came meanwhile.
[[nodiscard]] __device__ __forceinline__ bool opens(const Places& p) {
    const bool is_open = __syncthreads_or(threadIdx.x == 0 && comm::has_expired(p.wait)) == 0;
    if (blockIdx.x == 0 && threadIdx.x == 0) p.state->has_opened = is_open;
    return is_open;
}

// Sends this rank's opening to all ranks of the team, this one included. Called by all threads of one block.
__device__ __forceinline__ void send_opening(const Places& p, const Opening& opening, unsigned long long epoch,
                                             unsigned digest) {
    for (int i = static_cast<int>(threadIdx.x); i < p.team.num_ranks * kNumOpeningWords; i += kNumThreads) {
        const int peer = i / kNumOpeningWords, word = i % kNumOpeningWords;
        const bool is_agreed = word < kNumAgreedWords;
        const unsigned low = is_agreed ? agreed_value(opening, 2 * word, digest) : opening.num_tokens;
        const unsigned high = is_agreed ? agreed_value(opening, 2 * word + 1, digest) : opening.num_worst_tokens;
        OpeningSlots* slots = comm::window_pointer<OpeningSlots>(p.team, peer, p.opening_offset);
        comm::send_message(&slots->words[epoch % 2][p.team.rank][word],
                           low | static_cast<unsigned long long>(high) << 32, epoch);
    }
}

// Receives the openings of all ranks and compares them with this rank's. Called by all threads of a block.
//
// Returns, in all threads of the block alike and in all blocks of all ranks alike, whether all have come and agree; if
// not, that is in the record: the first value that differs, on the first rank on which it does. Orders nothing: what
// ranks do to each other's windows is ordered by rounds.
[[nodiscard]] __device__ __forceinline__ bool receive_openings(const Places& p, const Opening& opening,
                                                               unsigned long long epoch, unsigned digest,
                                                               PeerOpenings& peers) {
    const OpeningSlots* slots = comm::window_pointer<OpeningSlots>(p.team, p.team.rank, p.opening_offset);
    if (threadIdx.x == 0) peers.first_difference = ~0u;
    __syncthreads();
    bool has_come = true;
    for (int i = static_cast<int>(threadIdx.x); i < p.team.num_ranks * kNumOpeningWords; i += kNumThreads) {
        const int peer = i / kNumOpeningWords, word = i % kNumOpeningWords;
        const comm::ReceivedMessage message = comm::wait_message(&slots->words[epoch % 2][peer][word], epoch, p.wait,
                                                                 kPhaseOpen, comm::group_rank(p.team, peer));
        if (!message.has_come) {
            has_come = false;
            break;
        }
        const unsigned low = static_cast<unsigned>(message.payload);
        const unsigned high = static_cast<unsigned>(message.payload >> 32);
        if (word == kNumAgreedWords) {
            peers.num_tokens[peer] = static_cast<int>(low);
            peers.num_worst_tokens[peer] = high;
            continue;
        }
        for (int idx = 2 * word; idx < 2 * word + 2; ++idx)
            if ((idx % 2 == 0 ? low : high) != agreed_value(opening, idx, digest))
                atomicMin(&peers.first_difference, static_cast<unsigned>(idx * 128 + peer));
    }
    if (__syncthreads_and(has_come) == 0) return false;
    if (peers.first_difference == ~0u) return true;
    if (threadIdx.x == 0) {
        const int idx = static_cast<int>(peers.first_difference) / 128;
        const int peer = static_cast<int>(peers.first_difference) % 128;
        const comm::Message* slot = &slots->words[epoch % 2][peer][idx / 2];
        const int peer_rank = comm::group_rank(p.team, peer);
        const comm::ReceivedMessage message = comm::wait_message(slot, epoch, p.wait, kPhaseOpen, peer_rank);
        // The place of the value stands where a wait would tell its length.
        comm::report_timeout(p.wait, kPhaseDisagree, peer_rank, agreed_value(opening, idx, digest),
                             message.payload >> (32 * (idx % 2)) & 0xffffffffull, static_cast<unsigned>(idx));
    }
    return false;
}

}  // namespace deep_ep_legacy::normal
