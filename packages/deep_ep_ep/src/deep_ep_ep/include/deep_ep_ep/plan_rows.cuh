// The plan of a dispatch: the last row of every token at each of its receivers, before any of them moves.
//
// Each block counts the tokens of its range, or, when one tile holds all tokens of the rank, all of them, which spares
// the blocks from meeting. Then counts are exchanged between ranks, and each block finds the rows of its own tokens:
// what ranks before this one send, what blocks before this one send, and the place in the masks. Rows are therefore
// ordered by (source rank, token), whoever is fast.
#pragma once

#include <deep_ep_ep/exchange_counts.cuh>
#include <deep_ep_ep/token_masks.cuh>

namespace deep_ep_ep {

// Shared memory of the plan; its size is computed by `row_stages` in `deep_ep_ep.device.dispatch_kernel`.
struct PlanMemory {
    unsigned* masks;         // [kNumWarps, num_columns]
    unsigned* counts;        // [num_columns] of this rank; later the rows that tokens of this block start from
    unsigned* before_block;  // [num_columns] of the blocks before this one
    unsigned* totals;        // [num_columns] of all ranks
    unsigned* before_us;     // [num_columns] of the ranks before this one
    unsigned short* before;  // [kNumWarps, num_columns]
};

__device__ __forceinline__ PlanMemory plan_memory(const DispatchParams& p, unsigned char* smem) {
    const int columns = num_columns(p);
    PlanMemory memory;
    memory.masks = reinterpret_cast<unsigned*>(smem);
    memory.counts = memory.masks + kNumWarps * columns;
    memory.before_block = memory.counts + columns;
    memory.totals = memory.before_block + columns;
    memory.before_us = memory.totals + columns;
    memory.before = reinterpret_cast<unsigned short*>(memory.before_us + columns);
    return memory;
}

// Counts this rank's tokens by column, into memory.counts and memory.before_block. Called by all threads of each block.
// Returns false if the blocks could not meet. Raises `*invalid_token` in all blocks alike.
template <class Index>
[[nodiscard]] __device__ __forceinline__ bool count_tokens(const DispatchParams& p, const PlanMemory& memory, int begin,
                                                           int end, unsigned* invalid_token) {
    const int columns = num_columns(p), thread_idx = static_cast<int>(threadIdx.x);
    for (int column = thread_idx; column < columns; column += kNumThreads)
        memory.counts[column] = memory.before_block[column] = 0;
    if (thread_idx == 0) *invalid_token = 0;
    __syncthreads();
    const bool is_one_tile = p.num_tokens <= kTileTokens;
    const int count_begin = is_one_tile ? 0 : begin, count_end = is_one_tile ? p.num_tokens : end;
    for (int first = count_begin; first < count_end; first += kTileTokens) {
        fill_masks<Index>(p, memory.masks, first, count_end, invalid_token);
        for (int column = thread_idx; column < columns; column += kNumThreads)
            memory.counts[column] +=
                count_column(memory.masks, num_mask_rows(count_end - first), columns, column);
        __syncthreads();
    }
    if (is_one_tile) return true;
    for (int column = thread_idx; column < columns; column += kNumThreads)
        p.block_counts[static_cast<long long>(blockIdx.x) * columns + column] = memory.counts[column];
    if (thread_idx == 0 && *invalid_token != 0) atomicMax(&p.state->invalid_token, *invalid_token);
    if (!meet_grid(p.state, p.wait)) return false;
    for (int column = thread_idx; column < columns; column += kNumThreads) {
        unsigned count = 0;
        for (unsigned block = 0; block < gridDim.x; ++block) {
            if (block == blockIdx.x) memory.before_block[column] = count;
            count += __ldcg(&p.block_counts[static_cast<long long>(block) * columns + column]);
        }
        memory.counts[column] = count;
    }
    if (thread_idx == 0) *invalid_token = ptx::ld_relaxed<ptx::Scope::kGpu>(&p.state->invalid_token);
    __syncthreads();
    return true;
}

// Sum of the values of the lanes up to this one. Called by all lanes of a warp.
__device__ __forceinline__ int sum_up_to_lane(int value) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// Replaces memory.counts by the rows where this block's tokens start: of each rank, in its rows by token; of each
// expert, in the rows by expert of its rank. One warp a rank. Called by all threads; a barrier of the block must
// follow.
__device__ __forceinline__ void find_first_rows(const DispatchParams& p, const PlanMemory& memory) {
    const int num_ranks = p.team.num_ranks, num_local_experts = p.num_experts / num_ranks;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int rank = static_cast<int>(threadIdx.x) / 32; rank < num_ranks; rank += kNumWarps) {
        if (lane == 0) memory.counts[rank] = memory.before_us[rank] + memory.before_block[rank];
        int next = 0;
        for (int local = 0; local < num_local_experts; local += 32) {
            const bool is_expert = local + lane < num_local_experts;
            const int column = num_ranks + rank * num_local_experts + local + lane;
            const int aligned = is_expert ? align_up(static_cast<int>(memory.totals[column]), p.expert_alignment) : 0;
            const int end = sum_up_to_lane(aligned);
            if (is_expert)
                memory.counts[column] = static_cast<unsigned>(next + end - aligned) + memory.before_us[column] +
                                        memory.before_block[column];
            next += __shfl_sync(0xffffffffu, end, 31);
        }
    }
}

// Writes the part of the handle that has one value for this rank, and tells the host the counts. Called by all threads
// of one block, before the counts are overwritten. `row_ends` is in shared memory.
__device__ __forceinline__ void write_sums(const DispatchParams& p, const PlanMemory& memory, const int* row_ends) {
    const int num_ranks = p.team.num_ranks, num_local_experts = p.num_experts / num_ranks;
    const int thread_idx = static_cast<int>(threadIdx.x);
    const unsigned* of_experts = memory.totals + num_ranks + p.team.rank * num_local_experts;
    for (int rank = thread_idx; rank < num_ranks; rank += kNumThreads) {
        p.num_send_rows[rank] = static_cast<int>(memory.counts[rank]);
        p.recv_row_ends[rank] = row_ends[rank];
    }
    if (thread_idx < 32) {
        int next = 0;
        for (int first = 0; first < num_local_experts; first += 32) {
            const int local = first + thread_idx;
            const int count = local < num_local_experts ? static_cast<int>(of_experts[local]) : 0;
            const int aligned = align_up(count, p.expert_alignment);
            const int end = next + sum_up_to_lane(aligned);
            next = __shfl_sync(0xffffffffu, end, 31);
            if (local >= num_local_experts) continue;
            p.expert_ends[local] = p.do_expand ? end - aligned + count : end;
            p.num_expert_rows[local] = count;
            if (p.recv_stats != nullptr) p.recv_stats[local] += count;
            if (p.host_counts != nullptr) p.host_counts[2 + local] = aligned;
        }
        if (p.host_counts == nullptr) return;
        if (thread_idx == 0) p.host_counts[1] = row_ends[num_ranks - 1];
        // The host looks for the stamp without any CUDA call, while the kernel goes on.
        __syncwarp();
        if (thread_idx == 0) ptx::st_release<ptx::Scope::kSys>(&p.host_counts[0], p.host_stamp);
    }
}

// Writes the rows of the tokens of this block. Called by all threads of each block, behind a barrier.
template <class Index>
__device__ __forceinline__ void write_rows(const DispatchParams& p, const PlanMemory& memory, int begin, int end,
                                           unsigned* invalid_token) {
    const int columns = num_columns(p), num_ranks = p.team.num_ranks, num_topk = p.num_topk;
    const int num_local_experts = p.num_experts / num_ranks;
    const bool is_one_tile = p.num_tokens <= kTileTokens;
    // Of a range that needs several tiles only the masks of the last are still there.
    const bool has_masks = is_one_tile || end - begin <= kTileTokens;
    for (int first = is_one_tile ? 0 : begin; first < end; first += kTileTokens) {
        if (!has_masks) fill_masks<Index>(p, memory.masks, first, end, invalid_token);
        const int tile_end = is_one_tile ? p.num_tokens : end;
        sum_masks(memory.masks, memory.before, num_mask_rows(tile_end - first), columns);
        __syncthreads();
        // Of this tile only the tokens of this block.
        const int from = max(first, begin), to = min(first + kTileTokens, end);
        for (int i = static_cast<int>(threadIdx.x); i < (to - from) * num_topk; i += kNumThreads) {
            const int token = from + i / num_topk, k = i % num_topk;
            const long long entry = static_cast<long long>(token) * num_topk + k;
            const int expert = expert_of_entry<Index>(p, token, k);
            int row = -1, expert_row = -1, slot = -1;
            if (expert >= 0) {
                const int rank = expert / num_local_experts;
                // The last entry of a rank is the one that stands for the token.
                bool is_last = true;
                for (int later = k + 1; later < num_topk; ++later) {
                    const int other = expert_of_entry<Index>(p, token, later);
                    is_last &= other < 0 || other / num_local_experts != rank;
                }
                if (is_last) {
                    slot = place_in_column(memory.masks, memory.before, columns, token - first, rank);
                    row = static_cast<int>(memory.counts[rank]) + slot;
                    slot += static_cast<int>(memory.before_block[rank]);
                }
                if (p.do_expand) {
                    const int column = num_ranks + expert;
                    expert_row = static_cast<int>(memory.counts[column]) +
                                 place_in_column(memory.masks, memory.before, columns, token - first, column);
                }
            }
            p.row_of_entry[entry] = row;
            if (p.do_expand) p.expert_row_of_entry[entry] = expert_row;
            if (p.dst_slot != nullptr) p.dst_slot[entry] = row < 0 ? -1 : p.team.rank * p.num_max_tokens + slot;
            if (p.topk_idx_copy != nullptr)
                static_cast<Index*>(p.topk_idx_copy)[entry] = static_cast<const Index*>(p.topk_idx)[entry];
        }
        if (has_masks) break;
        // The next tile starts behind this one.
        __syncthreads();
        for (int column = static_cast<int>(threadIdx.x); column < columns; column += kNumThreads) {
            const unsigned count = count_column(memory.masks, num_mask_rows(end - first), columns, column);
            memory.counts[column] += count;
            memory.before_block[column] += count;
        }
        __syncthreads();
    }
}

}  // namespace deep_ep_ep
