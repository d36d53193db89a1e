// The layout of a routing on one rank: which token goes to which rank, and how many there are of each rank and expert.
#pragma once

#include <deep_ep_legacy/normal/dispatch_params.cuh>

namespace deep_ep_legacy::normal {

// Mirrored in `deep_ep_legacy.device.normal_kernels`. N, R and K as in `dispatch_params.cuh`.
struct LayoutParams {
    const void* topk_idx;        // [N, K]; entries outside of [0, num_experts) select nothing
    int* num_tokens_per_rank;    // [R], zero before
    int* num_tokens_per_expert;  // [num_experts], zero before
    bool* is_token_in_rank;      // [N, R]
    int num_tokens, num_topk, num_experts, num_ranks;
};

// Counts what a thread's token selects. Called by all threads of a block; those past the last token have none.
template <class Index>
__device__ __forceinline__ void lay_out_token(const LayoutParams& p, int token) {
    static_assert(comm::kMaxLsaRanks <= 128, "ranks are bits of two words");
    const bool has_token = token < p.num_tokens;
    const int num_local_experts = p.num_experts / p.num_ranks;
    unsigned long long low = 0, high = 0;
    for (int k = 0; has_token && k < p.num_topk; ++k) {
        const Index expert = static_cast<const Index*>(p.topk_idx)[static_cast<long long>(token) * p.num_topk + k];
        if (expert < 0 || expert >= p.num_experts) continue;
        atomicAdd(&p.num_tokens_per_expert[expert], 1);
        const int rank = static_cast<int>(expert) / num_local_experts;
        (rank < 64 ? low : high) |= 1ull << rank % 64;
    }
    for (int rank = 0; rank < p.num_ranks; ++rank) {
        const bool is_in_rank = ((rank < 64 ? low : high) >> rank % 64 & 1) != 0;
        if (has_token) p.is_token_in_rank[static_cast<long long>(token) * p.num_ranks + rank] = is_in_rank;
        const int num = __popc(__ballot_sync(kAllLanes, is_in_rank));
        if (num > 0 && threadIdx.x % 32 == 0) atomicAdd(&p.num_tokens_per_rank[rank], num);
    }
}

// The kernel's body.
template <DispatchConfig kConfig>
__device__ __forceinline__ void lay_out(const LayoutParams& p) {
    const int num_threads = static_cast<int>(gridDim.x) * kNumThreads;
    for (int first = static_cast<int>(blockIdx.x) * kNumThreads; first < p.num_tokens; first += num_threads)
        lay_out_token<typename IndexOf<kConfig.is_idx64>::Type>(p, first + static_cast<int>(threadIdx.x));
}

}  // namespace deep_ep_legacy::normal
