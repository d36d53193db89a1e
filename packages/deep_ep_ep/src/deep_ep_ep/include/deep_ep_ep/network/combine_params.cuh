// What the kernels of a combine across nodes are passed, and where rows that come back lie. Mirrored in
// `deep_ep_ep.device.network.combine_kernels`.
//
// T is the number of this rank's tokens, K `num_topk`, M `num_max_tokens`, N the number of ranks. All distances between
// rows are multiples of 16 bytes.
#pragma once

#include <deep_ep_ep/network/dispatch_params.cuh>
#include <deep_ep_ep/row_element.cuh>
#include <deep_ep_ep/row_stream.cuh>

namespace deep_ep_ep {

struct NetworkCombineConfig {
    RowType row_type;
    bool has_wide_idx;  // topk_idx is of 64 bits, else of 32; only the kernel that sums up looks at it
};

struct NetworkCombineParams {
    Network net;
    const void* x;             // [received rows] by token, or the rows by expert
    const float* weights;      // [received rows, K], or [rows by expert]; with `has_weights`
    const int* metadata;       // [received rows, K + 2], as in `EPHandle.recv_src_metadata`; with `do_expand`
    const int* recv_row_ends;  // [N] inclusive prefix sum of the rows received from each rank
    const int* expert_ends;    // [local experts] where the rows of each end; with `do_expand`
    void* staged_x;            // where the rows that ranks of the node read are made ready, in the window; null: in x
    float* staged_weights;     // [received rows, K], likewise; with `has_weights`
    const void* topk_idx;      // [T, K]
    const int* row_of_entry;   // [T, K] at the last entry of each rank its row there, else -1
    const int* slot_of_entry;  // [T, K] at the last entry of each relay the token's place there, else -1
    int* relay_counts;         // of the dispatch
    const int* forward_table;  // of the dispatch
    const void* biases[kMaxBiases];  // [T] rows, added in this order; or null
    void* out;                       // [T] rows
    float* out_weights;              // [T, K]; with `has_weights`
    // Of the slabs in the windows: rows that come back, and rows that this rank sends back as a relay.
    unsigned long long return_offset, send_offset;
    int num_tokens, num_topk, num_experts, num_max_tokens;
    int row_bytes;
    int return_bytes;       // of a row that comes back, with K weights behind it if there are any
    int num_layers;         // without partial sums of nodes: places for rows of a token in the slab of what comes back
    int max_record_rows;    // without partial sums of nodes: the most rows that one record brings back
    int chunk_rows;         // records that a block does at once; with partial sums also what is put at once
    bool do_expand;           // x is by expert
    bool is_single_rounding;  // every entry is brought back by itself; only with `do_expand`, and without weights
    bool is_hierarchical;     // a node sends back one partial sum for a token
    bool has_weights;
};

// Whether rows by expert are added up by their own rank first, into one row a received token.
__device__ __forceinline__ bool sums_on_own_rank(const NetworkCombineParams& p) {
    return p.do_expand && !p.is_single_rounding;
}

// Place of a row in the slab of what comes back. With partial sums of nodes they lie by relay and by place there, so
// that chunks are contiguous; otherwise by token, each with `num_layers` places: by rank where there are no more ranks
// than that, else by the row's last entry.
__device__ __forceinline__ long long return_of_slot(const NetworkCombineParams& p, int relay, int slot) {
    return static_cast<long long>(relay) * p.num_max_tokens + slot;
}

__device__ __forceinline__ long long return_of_entry(const NetworkCombineParams& p, int token, int rank, int k) {
    const bool is_by_rank = !p.is_single_rounding && p.num_layers == p.net.num_ranks;
    return static_cast<long long>(token) * p.num_layers + (is_by_rank ? rank : k);
}

__device__ __forceinline__ unsigned long long return_place(const NetworkCombineParams& p, long long idx) {
    return p.return_offset + static_cast<unsigned long long>(idx) * p.return_bytes;
}

// Place of a row that this rank sends back: of a record, and without partial sums the how-manieth row of it.
__device__ __forceinline__ unsigned long long send_place(const NetworkCombineParams& p, int relay, int slot, int idx) {
    const long long record = return_of_slot(p, relay, slot);
    const long long row = p.is_hierarchical ? record : record * p.max_record_rows + idx;
    return p.send_offset + static_cast<unsigned long long>(row) * p.return_bytes;
}

// A byte of this rank's window.
template <class T>
__device__ __forceinline__ T* own_place(const NetworkCombineParams& p, unsigned long long offset) {
    return comm::window_pointer<T>(p.net.team, p.net.team.rank, offset);
}

// Shared memory of the warps' streams.
struct StreamShared {
    RowLists lists[RowRing::kNumWarps][2];
    unsigned long long barriers[RowRing::kNumWarps][RowRing::kNumStages];
};

template <RowType kType>
__device__ __forceinline__ RowStream<kType> row_stream(const NetworkCombineParams& p, StreamShared& shared,
                                                       unsigned char* stages) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    return RowStream<kType>(
        p.net.wait,
        RowRing(stages + warp * (RowRing::kNumStages * RowRing::kPieceBytes), shared.barriers[warp], lane),
        shared.lists[warp], p.row_bytes, warp, lane);
}

}  // namespace deep_ep_ep
