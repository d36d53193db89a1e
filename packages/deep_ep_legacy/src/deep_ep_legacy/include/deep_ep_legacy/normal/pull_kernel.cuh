// The second kernel of a new dispatch, and the only one of a dispatch that repeats a routing: every rank pulls its rows
// from where their ranks have staged them, straight to their last place, ordered by (source rank, token).
//
// A row is read once over the link, and a token that goes to several ranks is staged once. All blocks of all ranks'
// kernels wait for each other, so all must be resident at once.
#pragma once

#include <deep_ep_legacy/normal/dispatch_params.cuh>

namespace deep_ep_legacy::normal {

struct PullShared {
    PeerOpenings peers;
    int recv_begin[comm::kMaxLsaRanks + 1];   // first row of each source
    int list_begin[comm::kMaxLsaRanks];       // tokens of each source's list that came in earlier rounds
    int list_end[comm::kMaxLsaRanks];         // and with this one
    int round_begin[comm::kMaxLsaRanks + 1];  // first row of each source among those of this round
};

// Lists the tokens from `first` on, as many as there are slots, for the ranks that they go to. Called by all threads of
// each block. It reads the handle, since only the first tokens of a new routing are listed as they are counted.
__device__ __forceinline__ void list_tokens(const DispatchParams& p, int first) {
    const DispatchStage stage(p, p.places.team.rank);
    const int num_ranks = p.places.team.num_ranks, end = min(first + p.num_slots, p.num_tokens);
    const int per_channel = tokens_per_channel(p.num_tokens, p.num_channels);
    const auto position_of = [&](int token, int dst) {
        const int channel = token / per_channel;
        const int* channel_ends = p.channel_prefix_matrix + static_cast<long long>(dst) * p.num_channels;
        return (channel == 0 ? 0 : channel_ends[channel - 1]) +
               p.send_head[static_cast<long long>(token) * num_ranks + dst];
    };
    const auto is_sent = [&](int token, int dst) {
        return p.is_token_in_rank[static_cast<long long>(token) * num_ranks + dst];
    };
    const long long num_entries = static_cast<long long>(end - first) * num_ranks;
    for (long long i = blockIdx.x * kNumThreads + threadIdx.x; i < num_entries; i += gridDim.x * kNumThreads) {
        const int token = first + static_cast<int>(i / num_ranks), dst = static_cast<int>(i % num_ranks);
        if (is_sent(token, dst)) *stage.listed(dst, position_of(token, dst)) = token;
    }
    // The ends are those of the last tokens that are sent. A warp looks for one, from the last token backwards.
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int dst = warp_of_rank(); dst < num_ranks; dst += num_rank_warps()) {
        unsigned found = 0;
        int last = end - 1;
        for (; last >= 0; last -= 32) {
            found = __ballot_sync(kAllLanes, last - lane >= 0 && is_sent(last - lane, dst));
            if (found != 0) break;
        }
        if (lane == 0) *stage.list_end(dst) = found == 0 ? 0 : position_of(last - (__ffs(found) - 1), dst) + 1;
    }
}

// Finds out which rows come in this round. Called by all threads of each block, when all ranks have staged.
__device__ __forceinline__ void find_rows(const DispatchParams& p, PullShared& shared, bool is_first) {
    const int num_ranks = p.places.team.num_ranks;
    for (int src = static_cast<int>(threadIdx.x); src < num_ranks; src += kNumThreads) {
        const int num = shared.recv_begin[src + 1] - shared.recv_begin[src];
        shared.list_begin[src] = is_first ? 0 : shared.list_end[src];
        // Never more than the handle says: ranks that pass handles of different dispatches harm nobody.
        shared.list_end[src] = max(min(*DispatchStage(p, src).list_end(p.places.team.rank), num),
                                   shared.list_begin[src]);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        shared.round_begin[0] = 0;
        for (int src = 0; src < num_ranks; ++src)
            shared.round_begin[src + 1] = shared.round_begin[src] + shared.list_end[src] - shared.list_begin[src];
    }
    __syncthreads();
}

// A row that a lane stands for.
struct RecvRow {
    int src;    // its source rank
    int slot;   // where its token is staged there; negative: nowhere, and there is nothing to do
    int place;  // its row in the results
};

// Writes, for a row, which token it is, and where channels begin that begin at it. Called by one thread.
//
// position: of the row among those of its source; token, before: the tokens of this row and of the one before it, -1 if
// there is none.
__device__ __forceinline__ void write_source(const DispatchParams& p, const PullShared& shared, int src, int position,
                                             int token, int before) {
    const int per_channel = tokens_per_channel(shared.peers.num_tokens[src], p.num_channels);
    int* starts = p.recv_channel_prefix_matrix + static_cast<long long>(src) * p.num_channels;
    p.recv_src_idx[shared.recv_begin[src] + position] = token;
    const int channel = token / per_channel;
    for (int other = before < 0 ? 0 : before / per_channel + 1; other <= channel; ++other) starts[other] = position;
    const int num = shared.recv_begin[src + 1] - shared.recv_begin[src];
    if (position + 1 == num)
        for (int other = channel + 1; other < p.num_channels; ++other) starts[other] = num;
}

// Finds the row of this round that each lane stands for. Called by all lanes of a warp; `idx` is below the number of
// rows of this round, or the lane has none.
__device__ __forceinline__ RecvRow find_row(const DispatchParams& p, const PullShared& shared, int first, int idx,
                                            bool has_row) {
    const int me = p.places.team.rank, src = block_of(shared.round_begin, p.places.team.num_ranks, has_row ? idx : 0);
    const DispatchStage stage(p, src);
    const int position = shared.list_begin[src] + idx - shared.round_begin[src];
    int token = -1;
    if (has_row) token = *stage.listed(me, position);
    int before = __shfl_up_sync(kAllLanes, token, 1);
    const int src_before = __shfl_up_sync(kAllLanes, src, 1);
    RecvRow row{src, token - first, shared.recv_begin[src] + position};
    // The same bounds again: what is read from a peer is not this rank's to vouch for.
    if (!has_row || row.slot >= p.num_slots || token >= shared.peers.num_tokens[src] || row.place >= p.num_recv)
        row.slot = -1;
    if (p.repeats || row.slot < 0) return row;
    if (threadIdx.x % 32 == 0 || src_before != src) {
        if (position == 0)
            before = -1;
        else if (position > shared.list_begin[src])
            before = *stage.listed(me, position - 1);
        else
            before = __ldcg(&p.recv_src_idx[row.place - 1]);
    }
    write_source(p, shared, src, position, token, before);
    return row;
}

// Writes what lies beside the rows of a warp: scales, and ids and weights as the receiver sees them. Called by all
// lanes of a warp; the first `num_rows` stand for rows.
template <class Index>
__device__ __forceinline__ void pull_sides(const DispatchParams& p, const RecvRow& own, int num_rows) {
    const int num_words = p.num_sf_packs + 2 * p.num_topk, lane = static_cast<int>(threadIdx.x) % 32;
    const int num_local_experts = p.num_experts / p.places.team.num_ranks;
    const int first_expert = p.places.team.rank * num_local_experts;
#pragma unroll 4
    for (int i = 0; i < num_rows * num_words; i += 32) {
        const int row_idx = min((i + lane) / num_words, num_rows - 1), word = i + lane - row_idx * num_words;
        const int src = __shfl_sync(kAllLanes, own.src, row_idx), slot = __shfl_sync(kAllLanes, own.slot, row_idx);
        const long long place = __shfl_sync(kAllLanes, own.place, row_idx);
        if (slot < 0 || word >= num_words) continue;
        const unsigned* side = DispatchStage(p, src).side(slot);
        if (word < p.num_sf_packs) {
            p.recv_sf[place * p.num_sf_packs + word] = side[word];
            continue;
        }
        const int k = word - p.num_sf_packs, entry = k < p.num_topk ? k : k - p.num_topk;
        const int local = static_cast<int>(side[p.num_sf_packs + entry]) - first_expert;
        const bool is_local = local >= 0 && local < num_local_experts;
        if (k < p.num_topk)
            static_cast<Index*>(p.recv_topk_idx)[place * p.num_topk + entry] = is_local ? local : -1;
        else
            p.recv_topk_weights[place * p.num_topk + entry] = is_local ? __uint_as_float(side[word]) : 0;
    }
}

// Pulls the rows of this round. Called by all threads of each block.
template <class Index>
__device__ __forceinline__ void pull_rows(const DispatchParams& p, const PullShared& shared, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Part part = part_of(shared.round_begin[p.places.team.num_ranks], warp_of_rank(), num_rank_warps());
    for (int begin = static_cast<int>(part.begin); begin < part.end; begin += 32) {
        const int num_rows = min(static_cast<int>(part.end) - begin, 32);
        const RecvRow own = find_row(p, shared, first, begin + lane, lane < num_rows);
        for (int i = 0; i < num_rows; ++i) {
            const int src = __shfl_sync(kAllLanes, own.src, i), slot = __shfl_sync(kAllLanes, own.slot, i);
            const long long place = __shfl_sync(kAllLanes, own.place, i);
            if (slot < 0) continue;
            copy_row(static_cast<char*>(p.recv_x) + place * p.row_bytes, DispatchStage(p, src).row(slot), p.row_bytes);
        }
        pull_sides<Index>(p, own, num_rows);
    }
}

// Writes what no row writes: -1 in the places of rows that do not come, and the channels of ranks that send nothing.
// Called by all threads of each block.
template <class Index>
__device__ __forceinline__ void fill_rest(const DispatchParams& p, const PullShared& shared) {
    const int num_ranks = p.places.team.num_ranks, num_recv = shared.recv_begin[num_ranks];
    const int thread_idx = static_cast<int>(blockIdx.x * kNumThreads + threadIdx.x);
    const int num_threads = static_cast<int>(gridDim.x) * kNumThreads;
    for (int row = num_recv + thread_idx; row < p.num_recv; row += num_threads) {
        p.recv_src_idx[row] = -1;
        for (int k = 0; k < p.num_topk; ++k)
            static_cast<Index*>(p.recv_topk_idx)[static_cast<long long>(row) * p.num_topk + k] = -1;
    }
    for (int i = thread_idx; i < num_ranks * p.num_channels; i += num_threads) {
        const int src = i / p.num_channels;
        if (shared.recv_begin[src] == shared.recv_begin[src + 1]) p.recv_channel_prefix_matrix[i] = 0;
    }
}

// Learns how many tokens each rank has, and whether the operation may go on. Called by all threads of each block.
[[nodiscard]] __device__ __forceinline__ bool begin_pull(const DispatchParams& p, PullShared& shared,
                                                         unsigned long long epoch) {
    const int num_ranks = p.places.team.num_ranks, thread_idx = static_cast<int>(threadIdx.x);
    if (p.repeats) {
        const unsigned digest = handle_digest(p.rank_prefix_matrix, num_ranks, shared.peers);
        // The other blocks find out as they wait for this rank's opening too.
        if (blockIdx.x == 0 && opens(p.places)) send_opening(p.places, p.opening, epoch, digest);
        if (!receive_openings(p.places, p.opening, epoch, digest, shared.peers)) return false;
    } else {
        for (int rank = thread_idx; rank < num_ranks; rank += kNumThreads)
            shared.peers.num_tokens[rank] = p.places.state->num_tokens[rank];
    }
    // If the first kernel has failed, there is no plan.
    if (__syncthreads_or(thread_idx == 0 && comm::has_expired(p.places.wait)) != 0) return false;
    for (int src = thread_idx; src <= num_ranks; src += kNumThreads)
        shared.recv_begin[src] = src == 0 ? 0 : p.rank_prefix_matrix[(src - 1) * num_ranks + p.places.team.rank];
    __syncthreads();
    return true;
}

// The kernel's body. A timeout or a disagreement is in the record; the kernel itself ends all the same.
template <DispatchConfig kConfig>
__device__ __forceinline__ void pull_dispatch(const DispatchParams& p) {
    using Index = typename IndexOf<kConfig.is_idx64>::Type;
    __shared__ PullShared shared;
    RankState* state = p.places.state;
    const unsigned long long epoch = state->epoch + (p.repeats ? 1 : 0);
    unsigned long long round = state->round;
    bool is_right = begin_pull(p, shared, epoch);
    const int num = is_right ? num_rounds(shared.peers.num_tokens, p.places.team.num_ranks, p.num_slots) : 0;
    for (int i = 0; i < num && is_right; ++i) {
        const int first = i * p.num_slots;
        // The window is still being read.
        if (i > 0 && !wait_for_round(p.places, &Flags::pulled, round, kPhasePulled)) is_right = false;
        ++round;
        if (is_right && (p.repeats || i > 0)) {
            stage_tokens<Index>(p, first);
            list_tokens(p, first);
            if (is_last_block(&state->num_staged)) publish_round(p.places, &Flags::staged, round);
        } else if (is_right && blockIdx.x == 0) {
            // Staged by the first kernel.
            publish_round(p.places, &Flags::staged, round);
        }
        is_right = is_right && wait_for_round(p.places, &Flags::staged, round, kPhaseStaged);
        if (!is_right) break;
        find_rows(p, shared, i == 0);
        pull_rows<Index>(p, shared, first);
        if (!is_last_block(&state->num_pulled)) continue;
        publish_round(p.places, &Flags::pulled, round);
        // Behind the kernel the window may be filled again, or be given back.
        if (i + 1 == num) is_right = wait_for_round(p.places, &Flags::pulled, round, kPhasePulled);
    }
    if (is_right && !p.repeats) fill_rest<Index>(p, shared);
    if (leave(state) && threadIdx.x == 0) {
        if (state->has_opened != 0) state->epoch = epoch;
        if (num > 0) state->round = round;
    }
}

}  // namespace deep_ep_legacy::normal
