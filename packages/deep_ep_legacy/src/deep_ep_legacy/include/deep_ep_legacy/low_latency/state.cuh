// What low-latency kernels of a rank remember between operations, and the words by which ranks tell each other.
//
// All kernels of a buffer run one after the other, so at most one touches the state at a time. Operations are counted
// on the device, so that a CUDA graph that is replayed goes on where it stopped. Operation e uses half e % 2 of the
// slabs and of the words; no word is ever reset, since each carries the number of its operation.
#pragma once

#include <deep_ep_core/comm/flag.cuh>
#include <deep_ep_core/comm/lsa_team.cuh>
#include <deep_ep_core/ptx/atom.cuh>

namespace deep_ep_legacy::low_latency {

namespace comm = deep_ep_core::comm;
namespace ptx = deep_ep_core::ptx;

inline constexpr int kNumThreads = 512;
inline constexpr int kNumWarps = kNumThreads / 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kMaxExperts = 4096;

// Phases of the kernels, for reports. Named in `deep_ep_legacy.device.low_latency_memory`, in this order.
inline constexpr unsigned kPhaseFree = 0;      // a peer that must have received the operation before the last
inline constexpr unsigned kPhaseCounts = 1;    // the rows of a dispatch, and how many they are
inline constexpr unsigned kPhaseRows = 2;      // the rows of a combine
inline constexpr unsigned kPhaseDecide = 3;    // this rank's first block, which decides who is masked

// What is reported without a wait. Named there too.
inline constexpr unsigned kNoteDisagree = 0;  // a peer called with other sizes or flags
inline constexpr unsigned kNoteInvalid = 1;   // topk_idx holds what is no expert and not -1; seen: the token
inline constexpr unsigned kNoteTooMany = 2;   // an expert was selected more than once by some token; seen: the expert

// Device memory of this rank, all zero at first. Mirrored in `deep_ep_legacy.device.low_latency_memory`.
struct LatencyState {
    unsigned long long num_sent;                     // operations of which this rank has sent its part
    unsigned num_done_sending;                       // blocks of the kernel that runs which have sent their part
    unsigned num_done_receiving;                     // likewise
    unsigned long long told[2][comm::kMaxLsaRanks];  // the last operation of a half that each rank was told of
    unsigned long long decided[kMaxExperts];         // words as the first block took them, where ranks may be masked
};

// In the window of each rank, written by its peers. Mirrored in the same module.
struct Signals {
    unsigned long long counts[2][kMaxExperts];           // by [source rank][local expert]: of a dispatch
    unsigned long long flags[2][comm::kMaxLsaRanks];     // by rank of the experts: the rows of a combine are there
    unsigned long long received[2][comm::kMaxLsaRanks];  // by peer: the operation that it has received last
};

// What is alike in the parameters of all kernels. Mirrored in `deep_ep_legacy.device.low_latency_kernels`.
struct CallParams {
    comm::LsaTeam team;  // all ranks of the group, so that ranks of the team are ranks of the group
    comm::WaitParams wait;
    comm::WaitParams notes;  // where what is wrong without a wait is reported: it ends no wait
    LatencyState* state;
    int* mask;                          // [N] 1 for a masked rank; null where none can be
    unsigned long long* epoch;          // the number of this operation, kept from its send part to its receive part
    long long* wait_stats;              // [N] nanoseconds that each rank was waited for are added; or null
    unsigned long long signals_offset;  // of `Signals`, in all windows
    unsigned long long slab_offset;     // of the first half, in all windows
    unsigned long long slab_bytes;      // of a half
    unsigned digest;                    // of what ranks must pass alike, 16 bits
    int num_experts;
    int num_max_tokens;
    int hidden;
};

__device__ __forceinline__ Signals* signals_of(const CallParams& call, int rank) {
    return comm::window_pointer<Signals>(call.team, rank, call.signals_offset);
}

__device__ __forceinline__ char* slab_of(const CallParams& call, int rank, unsigned long long epoch) {
    return comm::window_pointer<char>(call.team, rank, call.slab_offset + (epoch % 2) * call.slab_bytes);
}

__device__ __forceinline__ int num_local_experts(const CallParams& call) {
    return call.num_experts / call.team.num_ranks;
}

// A word tells its operation, what that was called with, and a count: bits 63 to 32, 31 to 16, 15 to 0.
__device__ __forceinline__ unsigned long long make_word(const CallParams& call, unsigned long long epoch,
                                                        unsigned count) {
    return epoch << 32 | static_cast<unsigned long long>(call.digest) << 16 | count;
}

// Whether this block is the last of its kernel to get here. Called by all threads of each block, once for a counter;
// the answer is the same in all of them. The last block has seen what all others did.
[[nodiscard]] __device__ __forceinline__ bool is_last_block(unsigned* num_done) {
    bool is_last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = ptx::atom_add_acq_rel<ptx::Scope::kGpu>(num_done, 1u) + 1 == gridDim.x;
        if (is_last) ptx::st_relaxed<ptx::Scope::kGpu>(num_done, 0u);
    }
    return __syncthreads_or(is_last) != 0;
}

}  // namespace deep_ep_legacy::low_latency
