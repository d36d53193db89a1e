// What the kernels of a dispatch across nodes are passed. Mirrored in `deep_ep_ep.device.network.dispatch_kernels`.
#pragma once

#include <deep_ep_ep/dispatch_params.cuh>
#include <deep_ep_ep/network/network.cuh>

namespace deep_ep_ep {

inline constexpr int kPlanThreads = 256;
// Tokens that are counted at a time: one a bit.
inline constexpr int kPlanTileTokens = 32;
inline constexpr int kMoveThreads = 512;

// Rows of `relay_counts`, each of `num_ranks` numbers of which as many are used as there are relays.
enum RelayCount : int {
    kRelaySent = 0,       // tokens of this rank for the relay
    kRelaySentBegin = 1,  // those for the relays before it
    kRelayComing = 2,     // rows that come to this rank as the relay of that one
    kRelayBack = 3,       // rows that a combine without partial sums of nodes brings back through it
    kNumRelayCounts = 4,
};

struct NetworkIndexConfig {
    bool is_idx64;  // topk_idx is int64, not int32
};

struct NetworkDispatchParams {
    Network net;
    DispatchParams local;            // what is the same as in one node; its opening has the values told only
    unsigned* tile_counts;           // [tiles, columns] tokens of earlier tiles that select a column
    unsigned* first_rows;            // [num_ranks + num_experts] rows at which this rank's tokens begin
    int* sent_tokens;                // [num_tokens * num_topk] tokens by relay, from kRelaySentBegin on
    int* slot_of_entry;              // [num_tokens, num_topk] place of the token among those of the entry's relay, at
                                     // the last entry of each relay; else -1
    int* relay_counts;               // [kNumRelayCounts, num_ranks]
    int* scaleup_row_ends;           // what the handle shows: by place in the node in hybrid mode, else by rank
    int* forward_table;              // [num_relays * num_max_tokens, 2 * num_topk + 1], see `place_rows.cuh`; or null
    // Of the slabs in the windows: of rows that come to this rank as a relay, [num_relays, num_max_tokens] records, and
    // of rows that it sends, without those of its own node.
    unsigned long long recv_offset, send_offset;
    int record_bytes;                // a row, its side record, and [num_topk] rows by token
    int chunk_rows;                  // records that are put at once
    bool is_single_rounding;         // a combine brings back every entry by itself
};

// Columns that are counted: ranks, experts, relays.
__device__ __forceinline__ int num_network_columns(const NetworkDispatchParams& p) {
    return p.net.num_ranks + p.local.num_experts + num_relays(p.net);
}

__device__ __forceinline__ int first_relay_column(const NetworkDispatchParams& p) {
    return p.net.num_ranks + p.local.num_experts;
}

__device__ __forceinline__ int* relay_counts(const NetworkDispatchParams& p, RelayCount count) {
    return p.relay_counts + static_cast<long long>(count) * p.net.num_ranks;
}

__device__ __forceinline__ long long forward_table_words(int num_topk) { return 2 * num_topk + 1; }

// A record of the slab of rows that come.
__device__ __forceinline__ unsigned char* recv_record(const NetworkDispatchParams& p, int relay, int slot) {
    const long long idx = static_cast<long long>(relay) * p.local.num_max_tokens + slot;
    return comm::window_pointer<unsigned char>(p.net.team, p.net.team.rank, p.recv_offset + idx * p.record_bytes);
}

}  // namespace deep_ep_ep
