// What the kernels of V1's normal calls keep between operations, and the rounds by which ranks take turns.
//
// An operation that moves rows has one round or more. In a round each rank stages rows in its own window and says so;
// then every rank pulls what it needs from all windows and says so; then the windows are free for the next round. Both
// messages are flags that hold the number of the last round, so nothing is ever reset. A rank's blocks do their share
// in any order, and the last of them to be done speaks for all: no block waits for another one of its rank.
#pragma once

#include <deep_ep_core/comm/flag.cuh>
#include <deep_ep_core/comm/lsa_team.cuh>

namespace deep_ep_legacy::normal {

namespace comm = deep_ep_core::comm;
namespace ptx = deep_ep_core::ptx;

inline constexpr int kNumThreads = 512;
inline constexpr int kNumWarps = kNumThreads / 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

// The phases of all kernels of this family; their names are in `deep_ep_legacy.device.normal_failures`.
inline constexpr unsigned kPhaseOpen = 0;      // a peer's opening of this operation
inline constexpr unsigned kPhaseCount = 1;     // a peer's row counts
inline constexpr unsigned kPhaseStaged = 2;    // the rows of a peer
inline constexpr unsigned kPhasePulled = 3;    // a peer that reads this rank's rows
inline constexpr unsigned kPhaseDisagree = 4;  // no wait: a peer opened the operation with other arguments
inline constexpr unsigned kPhaseClaim = 5;     // no wait: num_tokens_per_rank of a rank is not what its routing says
inline constexpr unsigned kPhaseWorst = 6;     // no wait: more rows come to a rank than its num_worst_tokens

// Device memory of this rank, all zero at first. Mirrored in `deep_ep_legacy.device.normal_kernels`.
struct RankState {
    unsigned long long epoch;            // operations opened so far
    unsigned long long round;            // rounds so far
    int num_tokens[comm::kMaxLsaRanks];  // of each rank, in the dispatch that was planned last
    unsigned num_staged;                 // blocks that are done with staging, in this round
    unsigned num_pulled;                 // blocks that are done with pulling, in this round
    unsigned num_exited;                 // blocks that have left the kernel that runs
    unsigned has_opened;                 // whether the operation that runs was opened; see `opens`
};

// Words that peers write, in each rank's window; they only grow. Mirrored likewise.
struct Flags {
    unsigned long long staged[comm::kMaxLsaRanks];  // the last round for which each rank has staged its rows
    unsigned long long pulled[comm::kMaxLsaRanks];  // the last round in which each rank has pulled all it needs
};

// Where these are, as part of the kernels' parameters.
struct Places {
    comm::LsaTeam team;
    comm::WaitParams wait;
    RankState* state;
    // In all windows: OpeningSlots; the counts, see `plan_kernel.cuh`; Flags; and the stage, of whatever is moved.
    unsigned long long opening_offset, counts_offset, flags_offset, stage_offset;
};

// Whether this block is the last one to get here. Called by all threads of each block; the answer is the same in all of
// them. The last block has seen what all others did, and the counter is zero again.
[[nodiscard]] __device__ __forceinline__ bool is_last_block(unsigned* num_blocks) {
    bool is_last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = ptx::atom_add_acq_rel<ptx::Scope::kGpu>(num_blocks, 1u) + 1 == gridDim.x;
        if (is_last) *num_blocks = 0;
    }
    return __syncthreads_or(is_last) != 0;
}

// Ends the kernel for a block. Called by all threads of each block, whatever has gone wrong in it. True in the last
// block, which counts what the kernel has done; counters that a failure left behind are zero again.
[[nodiscard]] __device__ __forceinline__ bool leave(RankState* state) {
    const bool is_last = is_last_block(&state->num_exited);
    if (is_last && threadIdx.x == 0) state->num_staged = state->num_pulled = 0;
    return is_last;
}

using FlagArray = unsigned long long (Flags::*)[comm::kMaxLsaRanks];

// Tells all ranks, this one included, that this rank is done with a step of a round. Called by all threads of one
// block. What the block did or saw before is visible to those who wait.
__device__ __forceinline__ void publish_round(const Places& p, FlagArray step, unsigned long long round) {
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += kNumThreads) {
        Flags* flags = comm::window_pointer<Flags>(p.team, peer, p.flags_offset);
        comm::publish_flag(&(flags->*step)[p.team.rank], round);
    }
}

// Waits until all ranks are done with a step. Called by all threads of a block; false in all of them if a rank did not
// come in time.
[[nodiscard]] __device__ __forceinline__ bool wait_for_round(const Places& p, FlagArray step, unsigned long long round,
                                                             unsigned phase_idx) {
    const Flags* flags = comm::window_pointer<Flags>(p.team, p.team.rank, p.flags_offset);
    bool has_come = true;
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += kNumThreads)
        has_come &= comm::wait_flag(&(flags->*step)[peer], round, p.wait, phase_idx, comm::group_rank(p.team, peer));
    return __syncthreads_and(has_come) != 0;
}

// Rounds that it takes to move the tokens of all ranks, so many of each rank at a time; at least one.
__device__ __forceinline__ int num_rounds(const int* num_tokens, int num_ranks, int num_slots) {
    int most = 1;
    for (int rank = 0; rank < num_ranks; ++rank) most = max(most, num_tokens[rank]);
    return (most - 1) / num_slots + 1;
}

// A part of a range, and the part that one of several takes: these follow each other and differ by at most one.
struct Part {
    long long begin;
    long long end;
};

__device__ __forceinline__ Part part_of(long long num, int idx, int num_parts) {
    return Part{num * idx / num_parts, num * (idx + 1) / num_parts};
}

// This warp among those of all blocks, neighbours in different blocks; and how many they are.
__device__ __forceinline__ int warp_of_rank() {
    return static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x);
}
__device__ __forceinline__ int num_rank_warps() { return static_cast<int>(gridDim.x) * kNumWarps; }

// The block of a sorted list of begins in which an index lies. `begins` has one more entry than there are blocks.
__device__ __forceinline__ int block_of(const int* begins, int num_blocks, int idx) {
    int block = 0;
    while (block + 1 < num_blocks && begins[block + 1] <= idx) ++block;
    return block;
}

// Copies 16-byte words. Called by all lanes of a warp.
__device__ __forceinline__ void copy_row(void* to, const void* from, int num_bytes) {
    constexpr int kBatch = 8;  // so that their loads wait together
    const uint4* in = static_cast<const uint4*>(from);
    uint4* out = static_cast<uint4*>(to);
    const int num = num_bytes / 16, lane = static_cast<int>(threadIdx.x) % 32;
    for (int first = lane; first < num; first += kBatch * 32) {
        uint4 words[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i * 32 < num) words[i] = in[first + i * 32];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i * 32 < num) out[first + i * 32] = words[i];
    }
}

}  // namespace deep_ep_legacy::normal
