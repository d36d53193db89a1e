// Which rank has an entry, and where this rank sees it.
//
// Mirrored in `deep_ep_engram.device.fetch_kernel`. The lists are in device memory and stay where they are as long as
// the table lives, so that a CUDA graph goes on with the entries of a later write. Kernels only read them.
#pragma once

#include <deep_ep_core/version.cuh>

namespace deep_ep_engram {

static_assert(deep_ep_core::headers_fit(0, 1), "deep-ep-core 0.1 is needed");

struct EntryTable {
    const long long* starts;            // [num_ranks + 1]: index of each rank's first entry, then the number of all
    const unsigned long long* entries;  // [num_ranks]: address of each rank's entries; 0 where no load reaches them
    int num_ranks;
};

// The indices of a fetch: `[num_rows]` int32 or int64.
struct IndexList {
    const void* values;
    bool is_wide;  // int64
};

// An entry by its owner.
struct Entry {
    int owner;      // rank in the group; -1 for an index that is out of range
    long long row;  // place among the entries of the owner
};

__device__ __forceinline__ long long load_index(const IndexList& indices, long long row) {
    return indices.is_wide ? __ldg(static_cast<const long long*>(indices.values) + row)
                           : static_cast<long long>(__ldg(static_cast<const int*>(indices.values) + row));
}

// Called by one thread. The number of steps is the binary logarithm of that of the ranks.
__device__ __forceinline__ Entry find_entry(const EntryTable& table, long long index) {
    if (index < 0 || index >= __ldg(table.starts + table.num_ranks)) return Entry{-1, 0};
    // `starts[low] <= index < starts[high]` throughout. So a rank without entries is never the one that is left.
    int low = 0, high = table.num_ranks;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (__ldg(table.starts + middle) <= index)
            low = middle;
        else
            high = middle;
    }
    return Entry{low, index - __ldg(table.starts + low)};
}

}  // namespace deep_ep_engram
