// Who gets an entry that several rows of a fetch want: one of them, and the others take it from there. So each distinct
// entry crosses the network once.
//
// A hash table with open addressing in device memory, all zero at first. There are at least twice as many slots as
// rows, so that a search is short and ends.
#pragma once

#include <deep_ep_core/ptx/atom.cuh>

namespace deep_ep_engram {

struct RowClaims {
    unsigned long long* keys;         // [num_slots]: an index plus 1; 0 for a free slot
    unsigned long long* row_of_slot;  // [num_slots]: the row that gets the entry
    unsigned long long* slot_of_row;  // [num_rows]
    unsigned long long num_slots;     // a power of two
};

// Claims an entry for a row. Called by one thread, for each row once; any number of them at a time.
//
// Returns whether this row gets the entry. The lists are for kernels that come later in the stream.
__device__ __forceinline__ bool claim_row(const RowClaims& claims, unsigned long long row, long long index) {
    namespace ptx = deep_ep_core::ptx;
    const unsigned long long key = static_cast<unsigned long long>(index) + 1;
    // 2^64 divided by the golden ratio: consecutive indices fall far apart.
    unsigned long long hash = key * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 32;
    for (unsigned long long slot = hash & (claims.num_slots - 1);; slot = (slot + 1) & (claims.num_slots - 1)) {
        const unsigned long long found = ptx::atom_cas_relaxed<ptx::Scope::kGpu>(claims.keys + slot, 0ull, key);
        if (found != 0 && found != key) continue;
        claims.slot_of_row[row] = slot;
        if (found == 0) claims.row_of_slot[slot] = row;
        return found == 0;
    }
}

}  // namespace deep_ep_engram
