// What the combine kernel is given, and how its slab is divided.
//
// N ranks, L experts of a rank, T `num_max_tokens`, H `hidden`, K `num_topk`.
#pragma once

#include <deep_ep_legacy/low_latency/logfmt.cuh>
#include <deep_ep_legacy/low_latency/peer_waits.cuh>

namespace deep_ep_legacy::low_latency {

struct CombineConfig {
    bool has_send;
    bool has_receive;
    bool is_logfmt;  // rows travel in ten bits a value
    bool is_idx64;   // topk_idx is of 64 bits, else of 32; of a kernel that receives
};

// Mirrored in `deep_ep_legacy.device.low_latency_kernels`.
struct CombineParams {
    CallParams call;
    const void* x;                  // [L, N * T, H] bfloat16
    const int* src_info;            // [L, N * T] as dispatch left it
    const long long* layout_range;  // [L, N] likewise
    const void* topk_idx;           // [num_tokens, K]
    const float* topk_weights;      // [num_tokens, K]
    void* out;                      // [num_tokens, H] bfloat16
    int num_tokens;
    int num_topk;
};

// The row of an expert for a token is in slot expert * T + token, with experts numbered through all ranks.
template <bool kIsLogfmt>
__device__ __forceinline__ int returned_bytes(int hidden) {
    return hidden * 2 + (kIsLogfmt ? pairs_bytes(hidden) : 0);
}

template <bool kIsLogfmt>
__device__ __forceinline__ char* returned_slot(const CallParams& call, char* slab, int expert, int token) {
    const long long slot = static_cast<long long>(expert) * call.num_max_tokens + token;
    return slab + slot * returned_bytes<kIsLogfmt>(call.hidden);
}

}  // namespace deep_ep_legacy::low_latency
