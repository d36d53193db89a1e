// What the dispatch kernel is given, and how its slab is divided.
//
// N ranks, L experts of a rank, T `num_max_tokens`, H `hidden`, K `num_topk`.
#pragma once

#include <deep_ep_legacy/low_latency/peer_waits.cuh>

namespace deep_ep_legacy::low_latency {

struct DispatchConfig {
    bool has_send;
    bool has_receive;
    bool is_fp8;    // rows are cast to FP8, else they stay bfloat16
    bool is_idx64;  // topk_idx is of 64 bits, else of 32; of a kernel that sends
};

// Mirrored in `deep_ep_legacy.device.low_latency_kernels`.
struct DispatchParams {
    CallParams call;
    const void* x;             // [num_tokens, H] bfloat16
    const void* topk_idx;      // [num_tokens, K]
    void* recv_x;              // [L, N * T, H]
    void* recv_scales;         // [L, H / 128, N * T] float, or [L, H / 512, N * T] int with `is_ue8m0`
    int* recv_count;           // [L]
    int* src_info;             // [L, N * T]
    long long* layout_range;   // [L, N]
    int* recv_stats;           // [L] rows are added; or null
    int num_tokens;
    int num_topk;
    bool is_rounded;  // scales are rounded up to powers of two
    bool is_ue8m0;
};

// Slots of the rows for expert l from rank r begin at slot (l * N + r) * T. A slot holds the row, its scales, and in
// its last 16 bytes the token.
template <bool kIsFp8>
__device__ __forceinline__ int row_bytes(int hidden) {
    return kIsFp8 ? hidden : hidden * 2;
}

template <bool kIsFp8>
__device__ __forceinline__ int slot_bytes(int hidden) {
    const int scales_bytes = kIsFp8 ? hidden / 128 * 4 : 0;
    return (row_bytes<kIsFp8>(hidden) + scales_bytes + 15) / 16 * 16 + 16;
}

}  // namespace deep_ep_legacy::low_latency
