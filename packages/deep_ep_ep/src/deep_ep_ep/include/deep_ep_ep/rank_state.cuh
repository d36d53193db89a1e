// What a rank's kernels remember from one operation to the next, and how the blocks of one kernel meet.
//
// All operations of a buffer run in one stream, so at most one kernel touches the state at a time. Epochs and totals
// live on the device and only grow: a CUDA graph that is replayed goes on where it stopped, and nothing has to be
// reset.
#pragma once

#include <deep_ep_core/comm/flag.cuh>
#include <deep_ep_core/comm/lsa_team.cuh>
#include <deep_ep_core/ptx/atom.cuh>

namespace deep_ep_ep {

namespace comm = deep_ep_core::comm;
namespace ptx = deep_ep_core::ptx;

// Phases of the kernels, for reports of waits that expire. Named in `deep_ep_ep.device.state`, in this order.
inline constexpr unsigned kPhaseOpen = 0;       // a peer's opening of this operation
inline constexpr unsigned kPhaseCount = 1;      // a peer's row counts
inline constexpr unsigned kPhaseGrid = 2;       // the other blocks of this rank
inline constexpr unsigned kPhaseLoad = 3;       // a copy into shared memory
inline constexpr unsigned kPhaseArrive = 4;     // the rows that a peer sends in a dispatch
inline constexpr unsigned kPhasePush = 5;       // the rows that a peer sends in a combine
inline constexpr unsigned kPhasePull = 6;       // a peer that reads this rank's rows in a combine
inline constexpr unsigned kPhaseDisagree = 7;   // no wait: a peer opened the operation with other arguments
inline constexpr unsigned kPhaseInvalid = 8;    // no wait: topk_idx of a rank holds what it must not

// Device memory of this rank, all zero at first. Mirrored in `deep_ep_ep.device.state`.
struct RankState {
    unsigned long long epoch;                               // operations opened so far
    unsigned long long num_arrived[comm::kMaxLsaRanks];     // rows that each peer has dispatched to this rank so far
    unsigned long long num_sides[comm::kMaxLsaRanks];       // side records of these rows, likewise
    unsigned long long num_pushed[comm::kMaxLsaRanks];      // rows that each peer has pushed back to it so far
    unsigned long long num_pulled[comm::kMaxLsaRanks];      // rows that each peer has pulled from it so far
    unsigned grid_count;                                    // blocks that stand at the barrier below
    unsigned grid_generation;                               // barriers that all blocks have passed
    unsigned num_exited;                                    // blocks that have left the kernel that runs
    unsigned invalid_token;                                 // 1 + a token whose topk_idx is wrong; 0: none
};

// Words that peers add to, in each rank's window; they only grow. Mirrored in `deep_ep_ep.device.state`.
struct Arrivals {
    unsigned long long num_arrived[comm::kMaxLsaRanks];  // by source: rows stored in this rank's dispatch output
    unsigned long long num_sides[comm::kMaxLsaRanks];    // by source: side records of these rows, stored beside them
    unsigned long long num_pushed[comm::kMaxLsaRanks];   // by expert rank: rows stored in this rank's combine slab
    unsigned long long num_pulled[comm::kMaxLsaRanks];   // by source: rows read from this rank's combine input
};

// Meets all blocks of this rank's kernel, which are resident at once. Called by all threads of each block. What any
// thread did before, also to peers, is visible to every thread afterwards. False in all threads of the block if some
// block did not come in time.
[[nodiscard]] __device__ __forceinline__ bool meet_grid(RankState* state, const comm::WaitParams& wait) {
    bool has_met = true;
    __syncthreads();
    if (threadIdx.x == 0 && gridDim.x > 1) {
        constexpr ptx::Scope kGpu = ptx::Scope::kGpu;
        const unsigned generation = ptx::ld_relaxed<kGpu>(&state->grid_generation);
        if (ptx::atom_add_acq_rel<kGpu>(&state->grid_count, 1u) + 1 == gridDim.x) {
            ptx::st_relaxed<kGpu>(&state->grid_count, 0u);
            ptx::st_release<kGpu>(&state->grid_generation, generation + 1);
        } else {
            has_met = comm::wait_until(wait, kPhaseGrid, wait.rank, gridDim.x,
                                       [state, generation](unsigned long long& seen) {
                                           seen = 0;
                                           return ptx::ld_acquire<kGpu>(&state->grid_generation) != generation;
                                       });
        }
    }
    return __syncthreads_and(has_met) != 0;
}

// Whether this block is the last of its kernel to get here. Called by all threads of each block, once, at the end; the
// answer is the same in all of them. The last block has seen what all others did.
[[nodiscard]] __device__ __forceinline__ bool is_last_block(RankState* state) {
    bool is_last = false;
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = ptx::atom_add_acq_rel<ptx::Scope::kGpu>(&state->num_exited, 1u) + 1 == gridDim.x;
        if (is_last) state->num_exited = 0;
    }
    return __syncthreads_or(is_last) != 0;
}

}  // namespace deep_ep_ep
