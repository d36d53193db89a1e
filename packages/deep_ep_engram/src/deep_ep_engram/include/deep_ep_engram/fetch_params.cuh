// What the kernel that copies fetched rows is given. Mirrored in `deep_ep_engram.device.fetch_kernel`.
#pragma once

#include <deep_ep_core/comm/timeout_record.cuh>
#include <deep_ep_engram/entry_table.cuh>

namespace deep_ep_engram {

namespace comm = deep_ep_core::comm;

// What the kernel is compiled for.
struct FetchConfig {
    int word_bytes;  // of a single load and store: 1, 2, 4, 8 or 16; divides the bytes of a row
};

// Where rows that came over the network lie until they are copied: those of a fetch, by the place of the index that
// got them. See `row_claims.cuh`.
struct StagedRows {
    const void* rows;
    const unsigned long long* slot_of_row;
    const unsigned long long* row_of_slot;
};

struct FetchParams {
    EntryTable table;
    IndexList indices;
    comm::WaitParams report;       // where an index that is out of range is reported; nothing here waits
    StagedRows staged;             // null unless `is_staged`
    void* data;                    // [num_rows, row_bytes], contiguous
    const unsigned* sf;            // [entries of all ranks, num_packs], contiguous; null without scales
    unsigned* out_sf;              // scales of row i: token i / num_each, columns from i % num_each * num_packs on
    long long num_rows;
    long long row_bytes;
    long long sf_token_stride;     // in packs, as the next
    long long sf_column_stride;
    unsigned long long fetch_idx;  // number of the fetch, for the report
    int num_each;                  // entries of a token
    int num_packs;                 // scale packs of an entry, 0 without
    bool is_staged;                // copy the rows that came over the network, and only these; else all others
};

}  // namespace deep_ep_engram
