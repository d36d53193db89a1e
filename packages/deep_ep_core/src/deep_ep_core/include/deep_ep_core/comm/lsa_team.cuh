// An LSA team as kernels see it: the ranks whose windows this rank reaches by load and store.
//
// Mirrored in `deep_ep_core.lsa_team`, which fills it.
#pragma once

namespace deep_ep_core::comm {

// The most ranks that a team may have: the GPUs of the largest NVLink domain (NVL72).
inline constexpr int kMaxLsaRanks = 72;

struct LsaTeam {
    // Where this rank sees each rank's window; null past `num_ranks`. All kernels reach its own window by this one
    // address: two addresses of a byte are aliases, between which the memory model wants a fence of its own (PTX ISA:
    // "Memory Consistency Model: Proxies").
    void* windows[kMaxLsaRanks];
    int rank;        // place of this rank in the team
    int num_ranks;   // ranks of the team
    int first_rank;  // rank in the group of the team's first; the others follow it
};

// A place in the window of a rank of the team, `offset` bytes behind its begin.
template <class T>
__device__ __forceinline__ T* window_pointer(const LsaTeam& team, int lsa_rank, unsigned long long offset) {
    return reinterpret_cast<T*>(static_cast<char*>(team.windows[lsa_rank]) + offset);
}

// Rank in the group of a rank of the team.
__device__ __forceinline__ int group_rank(const LsaTeam& team, int lsa_rank) { return team.first_rank + lsa_rank; }

}  // namespace deep_ep_core::comm
