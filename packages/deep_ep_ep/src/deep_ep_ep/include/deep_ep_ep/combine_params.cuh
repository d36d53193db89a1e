// What the combine kernel is given, and where rows that are pushed lie.
//
// Ranks are those of the team, which holds all ranks of the group. T is the number of this rank's tokens, K `num_topk`,
// M `num_max_tokens`, N the number of ranks. All pointers to rows, and all distances between rows, are multiples of 16
// bytes.
#pragma once

#include <deep_ep_ep/opening.cuh>
#include <deep_ep_ep/row_element.cuh>
#include <deep_ep_ep/row_stream.cuh>

namespace deep_ep_ep {

// What a rank tells in place of the offset of its rows when it pushes them.
inline constexpr unsigned long long kPushed = ~0ull;

struct CombineConfig {
    RowType row_type;
    bool has_wide_idx;  // topk_idx is of 64 bits, else of 32
};

// Mirrored in `deep_ep_ep.device.combine_kernel`.
struct CombineParams {
    comm::LsaTeam team;
    comm::WaitParams wait;
    RankState* state;
    unsigned long long opening_offset;   // of `OpeningSlots`, in all windows
    unsigned long long arrivals_offset;  // of `Arrivals`, in all windows
    // told[0]: offset of `x` in this rank's window, which peers read, or kPushed. told[1]: offset of this rank's slab,
    // where peers that push put rows and weights for it.
    Opening opening;
    const void* x;             // [received rows] token-major, or the expert-major rows
    const float* weights;      // of the rows of x: [received rows, K], or [expert-major rows]; with `has_weights`
    const int* metadata;       // [received rows, K + 2], as in `EPHandle.recv_src_metadata`
    const int* recv_row_ends;  // [N] inclusive prefix sum of the rows received from each rank
    const int* num_send_rows;  // [N] rows that this rank sent to each rank
    const void* topk_idx;      // [T, K]
    const int* row_of_entry;   // [T, K] row, among those its rank received, of an entry that is its token's last there
    const int* expert_row_of_entry;  // [T, K] expert-major row, on its rank, of each entry; with `do_expand`
    const void* biases[kMaxBiases];  // [T, row], added in this order; or null
    void* out;                       // [T, row]
    float* out_weights;              // [T, K]; with `has_weights`
    int num_tokens;
    int num_topk;
    int num_experts;
    int num_max_tokens;
    int row_bytes;
    bool do_expand;           // x is expert-major
    bool is_single_rounding;  // entries are not added up on their rank; only with `do_expand`, and without weights
    bool has_weights;         // weights are combined too, on all ranks
};

// The slab of a rank: a layer of M rows for each partial sum that a token can have, then the weights of each of these
// rows, [layers, M, K].
class Slab {
   public:
    __device__ __forceinline__ Slab(const CombineParams& p, int owner, unsigned long long offset)
        : p_(p), begin_(comm::window_pointer<char>(p.team, owner, offset)) {}

    // Whether a rank's partial sums have a layer of their own. If not, they lie in the layer of the last of the entries
    // that they stand for: a token has no more partial sums than entries.
    static __device__ __forceinline__ bool has_layer_of_rank(const CombineParams& p) {
        return !p.is_single_rounding && p.team.num_ranks <= p.num_topk;
    }

    __device__ __forceinline__ char* row(int layer, int token) const {
        return begin_ + row_idx(layer, token) * p_.row_bytes;
    }

    __device__ __forceinline__ float* weights(int layer, int token) const {
        const int num_layers = has_layer_of_rank(p_) ? p_.team.num_ranks : p_.num_topk;
        return reinterpret_cast<float*>(row(num_layers, 0)) + row_idx(layer, token) * p_.num_topk;
    }

   private:
    __device__ __forceinline__ long long row_idx(int layer, int token) const {
        return static_cast<long long>(layer) * p_.num_max_tokens + token;
    }

    const CombineParams& p_;
    char* begin_;
};

// What the blocks' threads share.
struct CombineShared {
    PeerOpenings peers;
    int num_pushed[comm::kMaxLsaRanks];  // rows that this block has pushed, by source
    int num_pulled[comm::kMaxLsaRanks];  // tokens of which this block has read rows, by expert rank
    RowLists lists[RowRing::kNumWarps][2];
    unsigned long long barriers[RowRing::kNumWarps][RowRing::kNumStages];
};

__device__ __forceinline__ bool is_pusher(const PeerOpenings& peers, int rank) {
    return peers.told[rank][0] == kPushed;
}

}  // namespace deep_ep_ep
