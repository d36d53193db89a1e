// The half of a dispatch that receives: rows go from their slots to the packed layout, ordered by source rank and token.
#pragma once

#include <deep_ep_legacy/low_latency/dispatch_params.cuh>
#include <deep_ep_legacy/low_latency/row_list.cuh>

namespace deep_ep_legacy::low_latency {

// Waits for all rows, and leaves how many there are of each expert and source rank, at l * N + r. Called by all threads
// of each block; ends with a barrier. Of a rank that did not come there are none.
__device__ __forceinline__ void wait_for_counts(const CallParams& call, unsigned long long epoch, Members& members,
                                                int* counts) {
    const int num_local = num_local_experts(call), num_ranks = call.team.num_ranks;
    const Signals* signals = signals_of(call, call.team.rank);
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    for (int word = static_cast<int>(threadIdx.x); word < call.num_experts; word += kNumThreads) {
        const int rank = word / num_local, local = word % num_local;
        const int count = wait_for_word(call, kPhaseCounts, rank, &signals->counts[epoch % 2][word], word, epoch);
        counts[local * num_ranks + rank] = max(count, 0);
        if (blockIdx.x == 0 && call.wait_stats != nullptr)
            atomicMax(&members.waited_ns[rank], ptx::globaltimer_ns() - begin_ns);
    }
    __syncthreads();
}

// Writes the scales of a row to their places in the transposed layout. Called by all lanes of a warp.
__device__ __forceinline__ void place_scales(const DispatchParams& p, const char* scales, int local, int row,
                                             int lane) {
    const int hidden = p.call.hidden;
    const long long num_rows = static_cast<long long>(p.call.team.num_ranks) * p.call.num_max_tokens;
    if (p.is_ue8m0) {
        const int num_packs = hidden / 512;
        for (int pack = lane; pack < num_packs; pack += 32) {
            const uint4 four = *reinterpret_cast<const uint4*>(scales + pack * 16);
            // Of a power of two, the exponent is all there is.
            const unsigned packed = four.x >> 23 | four.y >> 23 << 8 | four.z >> 23 << 16 | four.w >> 23 << 24;
            static_cast<unsigned*>(p.recv_scales)[(static_cast<long long>(local) * num_packs + pack) * num_rows + row] =
                packed;
        }
        return;
    }
    const int num_scales = hidden / 128;
    for (int group = lane; group < num_scales; group += 32)
        static_cast<float*>(p.recv_scales)[(static_cast<long long>(local) * num_scales + group) * num_rows + row] =
            *reinterpret_cast<const float*>(scales + group * 4);
}

// Receives the rows of all ranks. Called by all threads of each block.
//
// Order: each word was written by a release behind the rows that it counts, and is read by an acquire; the barrier
// behind the waits passes that on to the block. Rows have been read when the last block tells the peers so.
//
// firsts: shared memory for one integer more than there are experts.
template <bool kIsFp8>
__device__ __forceinline__ void receive_rows(const DispatchParams& p, unsigned long long epoch, Members& members,
                                             int* firsts) {
    const int num_ranks = p.call.team.num_ranks, num_local = num_local_experts(p.call), num_runs = p.call.num_experts;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    // Also keeps the table from being written while others of the block still read what the sending half left there.
    __syncthreads();
    find_members(p.call, members);
    __syncthreads();
    wait_for_counts(p.call, epoch, members, firsts);
    if (blockIdx.x == 0) add_wait_stats(p.call, members);
    number_runs(firsts, num_runs);
    if (blockIdx.x == 0) {
        for (int run = static_cast<int>(threadIdx.x); run < num_runs; run += kNumThreads) {
            const long long first = firsts[run] - firsts[run / num_ranks * num_ranks];
            p.layout_range[run] = first << 32 | (firsts[run + 1] - firsts[run]);
        }
        for (int local = static_cast<int>(threadIdx.x); local < num_local; local += kNumThreads) {
            const int num_rows = firsts[(local + 1) * num_ranks] - firsts[local * num_ranks];
            p.recv_count[local] = num_rows;
            if (p.recv_stats != nullptr) p.recv_stats[local] += num_rows;
        }
    }
    const char* slab = slab_of(p.call, p.call.team.rank, epoch);
    const int num_row_bytes = row_bytes<kIsFp8>(p.call.hidden), num_slot_bytes = slot_bytes<kIsFp8>(p.call.hidden);
    const int num_pieces = (num_row_bytes + kPieceBytes - 1) / kPieceBytes;
    const long long rows_per_expert = static_cast<long long>(num_ranks) * p.call.num_max_tokens;
    const long long num_tasks = static_cast<long long>(firsts[num_runs]) * num_pieces;
    for (long long task = static_cast<long long>(blockIdx.x) * kNumWarps + warp; task < num_tasks;
         task += static_cast<long long>(gridDim.x) * kNumWarps) {
        const int number = static_cast<int>(task / num_pieces), piece = static_cast<int>(task % num_pieces);
        const int run = run_of(firsts, num_runs, number);
        const int local = run / num_ranks, row = number - firsts[local * num_ranks];
        const char* slot = slab + (static_cast<long long>(run) * p.call.num_max_tokens + (number - firsts[run])) *
                                      num_slot_bytes;
        char* to = static_cast<char*>(p.recv_x) + (local * rows_per_expert + row) * num_row_bytes;
        const int offset = piece * kPieceBytes;
        copy_piece(to + offset, slot + offset, min(kPieceBytes, num_row_bytes - offset), lane);
        if (piece != 0) continue;
        if constexpr (kIsFp8) place_scales(p, slot + num_row_bytes, local, row, lane);
        if (lane == 0)
            p.src_info[local * rows_per_expert + row] = *reinterpret_cast<const int*>(slot + num_slot_bytes - 16);
    }
    if (is_last_block(&p.call.state->num_done_receiving)) tell_received(p.call, epoch);
}

}  // namespace deep_ep_legacy::low_latency
