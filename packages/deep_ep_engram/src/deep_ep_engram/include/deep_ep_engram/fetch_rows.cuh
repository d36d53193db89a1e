// The kernel of a fetch: it copies the entries that are wanted to where they are wanted, from wherever a load reaches
// them: this rank's memory, a peer's window, mapped host memory; in a second launch, those that came over the network.
//
// Blocks do not wait for anything and need not be resident together. Entries are read by plain loads: a write of the
// table is behind a meeting of all ranks' hosts, so that no entry changes while a kernel runs.
//
// An entry that is wanted twice is read twice. Inside a node the second read costs the link what the first did; to find
// equal indices first would cost every fetch a pass over them and a meeting of all blocks, and the indices of an n-gram
// table repeat little.
#pragma once

#include <deep_ep_engram/fetch_params.cuh>
#include <deep_ep_engram/row_copy.cuh>

namespace deep_ep_engram {

// This thread's warp among those of the grid, and how many there are.
struct WarpPlace {
    long long warp_idx;
    long long num_warps;
    int lane;
};

__device__ __forceinline__ WarpPlace find_warp() {
    const int warps_per_block = static_cast<int>(blockDim.x) / kWarpThreads;
    return WarpPlace{static_cast<long long>(blockIdx.x) * warps_per_block + static_cast<int>(threadIdx.x) / kWarpThreads,
                     static_cast<long long>(gridDim.x) * warps_per_block,
                     static_cast<int>(threadIdx.x) % kWarpThreads};
}

// Where a row is to be copied from; `kLeaveOut` for what this launch does not copy, and `kZeros` for an index that is
// out of range, which is reported. Called by one thread.
__device__ __forceinline__ unsigned long long find_source(const FetchParams& p, long long row) {
    const long long index = load_index(p.indices, row);
    const Entry entry = find_entry(p.table, index);
    if (entry.owner < 0) {
        if (p.is_staged) return kLeaveOut;
        constexpr unsigned kOnlyPhase = 0;
        // The record is that of a wait; `deep_ep_engram.device.fetcher` reads these members as what they are here.
        comm::report_timeout(p.report, kOnlyPhase, p.num_each, static_cast<unsigned long long>(row),
                             static_cast<unsigned long long>(index), p.fetch_idx);
        return kZeros;
    }
    const unsigned long long entries = __ldg(p.table.entries + entry.owner);
    if (p.is_staged) {
        if (entries != 0) return kLeaveOut;
        const unsigned long long staged_row = p.staged.row_of_slot[p.staged.slot_of_row[row]];
        return reinterpret_cast<unsigned long long>(p.staged.rows) + staged_row * p.row_bytes;
    }
    return entries == 0 ? kLeaveOut : entries + entry.row * p.row_bytes;
}

// Rows of a segment or more, piece by piece. Warps take pieces in turn, so that few long rows keep all of them busy;
// each looks up 32 pieces at a time, one a lane.
template <class Word>
__device__ __forceinline__ void fetch_long_rows(const FetchParams& p, long long row_words) {
    const WarpPlace place = find_warp();
    const long long num_pieces = (row_words + kSegmentWords - 1) / kSegmentWords;
    const long long num_items = p.num_rows * num_pieces;
    for (long long first = place.warp_idx; first < num_items; first += kWarpThreads * place.num_warps) {
        const long long own_item = first + place.lane * place.num_warps;
        const unsigned long long own_source =
            own_item < num_items ? find_source(p, own_item / num_pieces) : kLeaveOut;
        for (int turn = 0; turn < kWarpThreads; ++turn) {
            const long long item = first + turn * place.num_warps;
            if (item >= num_items) break;
            const unsigned long long source = __shfl_sync(0xffffffffu, own_source, turn);
            if (source == kLeaveOut) continue;
            const long long row = item / num_pieces;
            const long long first_word = (item - row * num_pieces) * kSegmentWords;
            const long long num_left = row_words - first_word;
            copy_piece(static_cast<Word*>(p.data) + row * row_words + first_word,
                       source == kZeros ? kZeros : source + first_word * sizeof(Word),
                       num_left < kSegmentWords ? static_cast<int>(num_left) : kSegmentWords, place.lane);
        }
    }
}

// Rows below a segment: up to 32 consecutive ones a warp and turn, fewer where there would not be enough for all warps.
template <class Word>
__device__ __forceinline__ void fetch_short_rows(const FetchParams& p, int row_words) {
    const WarpPlace place = find_warp();
    const long long num_fair = (p.num_rows + place.num_warps - 1) / place.num_warps;
    const int num_at_once = num_fair < kWarpThreads ? static_cast<int>(num_fair) : kWarpThreads;
    const unsigned reciprocal = row_reciprocal(row_words);
    for (long long first = place.warp_idx * num_at_once; first < p.num_rows; first += place.num_warps * num_at_once) {
        const long long num_left = p.num_rows - first;
        const int num = num_left < num_at_once ? static_cast<int>(num_left) : num_at_once;
        const unsigned long long source = place.lane < num ? find_source(p, first + place.lane) : kLeaveOut;
        copy_short_rows(static_cast<Word*>(p.data) + first * row_words, source, num, row_words, reciprocal,
                        place.lane);
    }
}

// The scales of all rows, from this rank's own copy. Zeros for an index that is out of range.
__device__ __forceinline__ void fetch_scales(const FetchParams& p) {
    const long long num_threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long num_packs = p.num_packs;
    for (long long pack = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
         pack < p.num_rows * num_packs; pack += num_threads) {
        const long long row = pack / num_packs, pack_of_row = pack - row * num_packs;
        const long long token = row / p.num_each, column = (row - token * p.num_each) * num_packs + pack_of_row;
        const long long index = load_index(p.indices, row);
        const bool is_right = index >= 0 && index < __ldg(p.table.starts + p.table.num_ranks);
        p.out_sf[token * p.sf_token_stride + column * p.sf_column_stride] =
            is_right ? __ldg(p.sf + index * num_packs + pack_of_row) : 0u;
    }
}

// The kernel's body, for blocks of whole warps.
template <FetchConfig kConfig>
__device__ __forceinline__ void fetch_rows(const FetchParams& p) {
    using Word = typename WordOf<kConfig.word_bytes>::Type;
    const long long row_words = p.row_bytes / kConfig.word_bytes;
    if (row_words < kSegmentWords)
        fetch_short_rows<Word>(p, static_cast<int>(row_words));
    else
        fetch_long_rows<Word>(p, row_words);
    if (p.num_packs != 0 && !p.is_staged) fetch_scales(p);
}

}  // namespace deep_ep_engram
