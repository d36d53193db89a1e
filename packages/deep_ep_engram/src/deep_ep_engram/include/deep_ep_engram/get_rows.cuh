// The kernel that asks for entries which no load reaches: GIN gets from their owners' windows into the stage of this
// rank's. It waits for none of them; `wait_rows.cuh` does. Owners take no part.
//
// Block b uses context b. Mirrored in `deep_ep_engram.device.network_kernel`.
#pragma once

#include <deep_ep_core/comm/gin.cuh>
#include <deep_ep_engram/entry_table.cuh>
#include <deep_ep_engram/row_claims.cuh>

namespace deep_ep_engram {

struct GetParams {
    ncclDevComm dev_comm;
    ncclWindow_t window;
    EntryTable table;
    IndexList indices;
    RowClaims claims;
    unsigned* has_asked;                // [gridDim.x, num_ranks], all zero: 1 where a context has asked a rank
    unsigned long long entries_offset;  // in the windows of all ranks, in bytes
    unsigned long long stage_offset;    // in the own window: [num_rows, row_bytes]
    long long num_rows;
    long long row_bytes;
};

// The kernel's body, for blocks of whole warps.
__device__ __forceinline__ void get_rows(const GetParams& p) {
    namespace comm = deep_ep_core::comm;
    constexpr int kWarpThreads = 32;
    constexpr unsigned kAllLanes = 0xffffffffu;
    const ncclGin gin(p.dev_comm, static_cast<int>(blockIdx.x));
    const ncclTeam world = ncclTeamWorld(p.dev_comm);
    const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
    const long long num_threads = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long first = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x - lane; first < p.num_rows;
         first += num_threads) {
        const long long row = first + lane;
        Entry entry{-1, 0};
        bool is_getter = false;
        if (row < p.num_rows) {
            const long long index = load_index(p.indices, row);
            entry = find_entry(p.table, index);
            if (entry.owner >= 0 && p.table.entries[entry.owner] == 0)
                is_getter = claim_row(p.claims, static_cast<unsigned long long>(row), index);
        }
        // One lane asks for all: threads of a warp that wait for the same queue would hold each other up.
        for (unsigned getters = __ballot_sync(kAllLanes, is_getter); getters != 0; getters &= getters - 1) {
            const int getter = __ffs(static_cast<int>(getters)) - 1;
            const int owner = __shfl_sync(kAllLanes, entry.owner, getter);
            const long long owner_row = __shfl_sync(kAllLanes, entry.row, getter);
            if (lane != 0) continue;
            comm::gin_get(gin, world, owner,
                          {p.window, p.entries_offset + static_cast<unsigned long long>(owner_row * p.row_bytes)},
                          {p.window, p.stage_offset + static_cast<unsigned long long>((first + getter) * p.row_bytes)},
                          static_cast<unsigned long long>(p.row_bytes));
            p.has_asked[static_cast<long long>(blockIdx.x) * p.table.num_ranks + owner] = 1;
        }
    }
}

}  // namespace deep_ep_engram
