// The receiving half of a dispatch: waits for the rows of each source, writes what lies beside them (ids, weights,
// scales, metadata) from the side records into the results, and copies rows on where they are not at their last place
// yet.
#pragma once

#include <deep_ep_ep/row_stages.cuh>

namespace deep_ep_ep {

// Entries of a row whose facts a thread loads together.
inline constexpr int kFactsBatch = 8;

// Waits until all rows of this operation have come. Their side records have come before, see `side_records.cuh`. Called
// by all threads of each block; the same answer in all threads of the block.
[[nodiscard]] __device__ __forceinline__ bool wait_for_rows(const DispatchParams& p, const int* row_ends) {
    const Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, p.team.rank, p.arrivals_offset);
    bool have_come = true;
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += kNumThreads) {
        const unsigned long long count = row_ends[peer] - (peer > 0 ? row_ends[peer - 1] : 0);
        have_come &= comm::wait_flag(&arrivals->num_arrived[peer], p.state->num_arrived[peer] + count, p.wait,
                                     kPhaseArrive, comm::group_rank(p.team, peer));
    }
    return __syncthreads_and(have_come) != 0;
}

// Rank of the group that a received row came from.
__device__ __forceinline__ int source_of_row(const DispatchParams& p, const int* row_ends, int row) {
    int low = 0, high = p.num_ranks - 1;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (row < row_ends[middle])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

__device__ __forceinline__ const unsigned* side_of_row(const DispatchParams& p, int row) {
    const char* sides = comm::window_pointer<const char>(p.team, p.team.rank, p.opening.told[1] & ~kByExpert);
    return reinterpret_cast<const unsigned*>(sides + static_cast<long long>(row) * p.side_bytes);
}

// Writes ids, weights and metadata, one thread a row.
template <class Index>
__device__ __forceinline__ void write_row_facts(const DispatchParams& p, const int* row_ends, int num_rows,
                                                const Workers& workers) {
    const int num_local_experts = p.num_experts / p.num_ranks, num_topk = p.num_topk;
    const int first_expert = p.wait.rank * num_local_experts;
    const SideLayout layout = side_layout(p);
    for (int row = workers.idx; row < num_rows; row += workers.num) {
        const unsigned* side = side_of_row(p, row);
        const int source = source_of_row(p, row_ends, row);
        int* metadata = p.metadata == nullptr ? nullptr : p.metadata + static_cast<long long>(row) * (num_topk + 2);
        int last_local = -1;
        // All loads of a batch come before its stores, which might be to the same memory for all that is known.
        for (int first = 0; first < num_topk; first += kFactsBatch) {
            int local[kFactsBatch], expert_row[kFactsBatch];
            unsigned weight[kFactsBatch];
#pragma unroll
            for (int i = 0; i < kFactsBatch; ++i) {
                const int k = first + i;
                if (k >= num_topk) break;
                local[i] = static_cast<int>(side[layout.ids + k]) - first_expert;
                weight[i] = p.topk_weights != nullptr ? side[layout.weights + k] : 0;
                expert_row[i] = p.do_expand ? static_cast<int>(side[layout.rows + k]) : -1;
            }
#pragma unroll
            for (int i = 0; i < kFactsBatch; ++i) {
                const int k = first + i;
                if (k >= num_topk) break;
                const bool is_local = 0 <= local[i] && local[i] < num_local_experts;
                if (is_local) last_local = k;
                const long long entry = static_cast<long long>(row) * num_topk + k;
                if (p.recv_topk_idx != nullptr)
                    static_cast<Index*>(p.recv_topk_idx)[entry] = static_cast<Index>(is_local ? local[i] : -1);
                if (p.recv_topk_weights != nullptr && (!p.do_expand || is_local))
                    p.recv_topk_weights[p.do_expand ? expert_row[i] : entry] = __uint_as_float(weight[i]);
                if (metadata != nullptr) metadata[2 + k] = is_local ? expert_row[i] : -1;
            }
        }
        if (metadata != nullptr) {
            metadata[0] = source * p.num_max_tokens + static_cast<int>(side[layout.token]);
            metadata[1] = source * num_topk + last_local;
        }
    }
}

// Writes the scales: `Pack` is one of them, or four where these lie together in the results too. One thread a pack.
template <class Pack>
__device__ __forceinline__ void write_packs(const DispatchParams& p, int num_rows, const Workers& workers) {
    constexpr int kNumScales = sizeof(Pack) / sizeof(unsigned);
    const int num_local_experts = p.num_experts / p.num_ranks;
    const int first_expert = p.wait.rank * num_local_experts;
    const SideLayout layout = side_layout(p);
    const int num_packs = p.num_sf_packs / kNumScales;
    const long long num_all = static_cast<long long>(num_rows) * num_packs;
    const auto store = [&p](long long to_row, int pack, const Pack& value) {
        unsigned* to = p.recv_sf + to_row * p.recv_sf_row_stride + pack * kNumScales * p.recv_sf_pack_stride;
        *reinterpret_cast<Pack*>(to) = value;
    };
    constexpr int kBatch = 4;
    for (long long i = workers.idx; i < num_all; i += static_cast<long long>(kBatch) * workers.num) {
        Pack values[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const long long at = i + static_cast<long long>(j) * workers.num;
            if (at < num_all)
                values[j] = reinterpret_cast<const Pack*>(
                    side_of_row(p, static_cast<int>(at / num_packs)))[at % num_packs];
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
            const long long at = i + static_cast<long long>(j) * workers.num;
            if (at >= num_all) break;
            const int row = static_cast<int>(at / num_packs), pack = static_cast<int>(at % num_packs);
            if (!p.do_expand) {
                store(row, pack, values[j]);
                continue;
            }
            const unsigned* side = side_of_row(p, row);
            for (int k = 0; k < p.num_topk; ++k) {
                const int local = static_cast<int>(side[layout.ids + k]) - first_expert;
                if (0 <= local && local < num_local_experts)
                    store(static_cast<int>(side[layout.rows + k]), pack, values[j]);
            }
        }
    }
}

__device__ __forceinline__ void write_scales(const DispatchParams& p, int num_rows, const Workers& workers) {
    const bool are_together = p.num_sf_packs % 4 == 0 && p.recv_sf_pack_stride == 1 && p.recv_sf_row_stride % 4 == 0;
    if (are_together)
        write_packs<uint4>(p, num_rows, workers);
    else
        write_packs<unsigned>(p, num_rows, workers);
}

// Writes what lies beside the rows of this rank. Called by all of the workers, when the side records have come.
template <class Index>
__device__ __forceinline__ void write_sides(const DispatchParams& p, const int* row_ends, const Workers& workers) {
    const int num_rows = row_ends[p.num_ranks - 1];
    if (p.recv_topk_idx != nullptr || p.recv_topk_weights != nullptr || p.metadata != nullptr)
        write_row_facts<Index>(p, row_ends, num_rows, workers);
    if (p.recv_sf != nullptr) write_scales(p, num_rows, workers);
}

// Copies rows to where they are wanted: out of the staging region, or from the first of an expert's rows to the others.
// Called by all threads of each block.
__device__ __forceinline__ void copy_rows_on(const DispatchParams& p, RowStage& stage, int num_rows) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    if (warp >= p.num_stages) return;
    const int num_local_experts = p.num_experts / p.num_ranks;
    const int first_expert = p.wait.rank * num_local_experts;
    const int num_pieces = (p.row_bytes + p.piece_bytes - 1) / p.piece_bytes;
    const SideLayout layout = side_layout(p);
    const ptx::CachePolicy once = ptx::evict_first_policy();
    const unsigned char* region = comm::window_pointer<const unsigned char>(p.team, p.team.rank, p.opening.told[0]);
    unsigned char* recv_x = static_cast<unsigned char*>(p.recv_x);
    ptx::fence_proxy_async_global();
    const int num_blocks = static_cast<int>(gridDim.x);
    const long long num_items = static_cast<long long>(num_rows) * num_pieces;
    const long long step = static_cast<long long>(p.num_stages) * num_blocks;
    for (long long item = static_cast<long long>(warp) * num_blocks + blockIdx.x; item < num_items; item += step) {
        const int row = static_cast<int>(item / num_pieces), piece = static_cast<int>(item % num_pieces);
        const int offset = piece * p.piece_bytes, num_bytes = min(p.piece_bytes, p.row_bytes - offset);
        // Where this lane stores the row: -1 is nowhere.
        int to_row = lane == 0 ? row : -1, from_row = row;
        if (p.do_expand) {
            const unsigned* side = side_of_row(p, row);
            to_row = -1;
            if (lane < p.num_topk) {
                const int local = static_cast<int>(side[layout.ids + lane]) - first_expert;
                if (0 <= local && local < num_local_experts) to_row = static_cast<int>(side[layout.rows + lane]);
            }
            if (!p.is_staged) {
                // The sender has stored the row for the last of its entries here.
                const unsigned is_wanted = __ballot_sync(0xffffffffu, to_row >= 0);
                if (__popc(is_wanted) <= 1) continue;
                const int last = 31 - __clz(is_wanted);
                from_row = __shfl_sync(0xffffffffu, to_row, last);
                if (lane == last) to_row = -1;
            }
        }
        free_stage();
        begin_load(stage, region + static_cast<long long>(from_row) * p.row_bytes + offset, num_bytes, once);
        if (!end_load(p, stage)) return;
        if (to_row >= 0)
            ptx::bulk_store(recv_x + static_cast<long long>(to_row) * p.row_bytes + offset, stage.piece, num_bytes);
        ptx::bulk_commit();
    }
    ptx::bulk_wait<0>();
}

// Writes zeros into the rows between the last of an expert and the first of the next. Called by all threads.
__device__ __forceinline__ void zero_gaps(const DispatchParams& p) {
    const int num_local_experts = p.num_experts / p.num_ranks;
    const int words_a_row = p.row_bytes / 16;
    for (int local = static_cast<int>(blockIdx.x); local < num_local_experts; local += static_cast<int>(gridDim.x)) {
        const int count = p.num_expert_rows[local], begin = p.expert_ends[local];
        const int num_rows = align_up(count, p.expert_alignment) - count;
        uint4* x = static_cast<uint4*>(p.recv_x) + static_cast<long long>(begin) * words_a_row;
        for (long long i = threadIdx.x; i < static_cast<long long>(num_rows) * words_a_row; i += kNumThreads)
            x[i] = uint4{0, 0, 0, 0};
        for (int i = static_cast<int>(threadIdx.x); p.recv_topk_weights != nullptr && i < num_rows; i += kNumThreads)
            p.recv_topk_weights[begin + i] = 0;
        const long long num_packs = p.recv_sf == nullptr ? 0 : static_cast<long long>(num_rows) * p.num_sf_packs;
        for (long long i = threadIdx.x; i < num_packs; i += kNumThreads) {
            const long long row = begin + i / p.num_sf_packs, pack = i % p.num_sf_packs;
            p.recv_sf[row * p.recv_sf_row_stride + pack * p.recv_sf_pack_stride] = 0;
        }
    }
}

}  // namespace deep_ep_ep
