// The first kernel of a new dispatch: it makes the routing's handle, tells the ranks each other's counts, tells the
// host how many rows come, and stages the first tokens meanwhile. No rank reads another's stage before the second
// kernel.
//
// Tokens for a rank keep their order: one block counts all tokens for it, by prefix sums.
#pragma once

#include <deep_ep_legacy/normal/dispatch_params.cuh>

namespace deep_ep_legacy::normal {

// The most experts of one rank. Mirrored in `deep_ep_legacy.device.normal_kernels`.
inline constexpr int kMaxLocalExperts = 1024;
// Consecutive tokens that a thread counts at a time.
inline constexpr int kThreadTokens = 8;

struct PlanShared {
    PeerOpenings peers;
    int warp_sums[kNumWarps];
    int num_sent[comm::kMaxLsaRanks * comm::kMaxLsaRanks];  // by source and destination
    int num_recv[comm::kMaxLsaRanks];                       // rows that come to each rank
    int num_selections[kMaxLocalExperts];
};

// Messages of a sender in a rank's window, by the epoch's parity: how many tokens go to each rank, with what
// `num_tokens_per_rank` claims of it, and then how many selections there are of each expert of the receiver.
__device__ __forceinline__ comm::Message* count_slots(const Places& p, int at_rank, int sender,
                                                      unsigned long long epoch) {
    const long long slots = (static_cast<long long>(epoch % 2) * p.team.num_ranks + sender);
    return comm::window_pointer<comm::Message>(p.team, at_rank, p.counts_offset) +
           slots * (p.team.num_ranks + kMaxLocalExperts);
}

// Sum of the values of the threads before this one, and of all of them. Called by all threads of a block.
__device__ __forceinline__ int sum_before(int value, int* warp_sums, int& total) {
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int sum = value;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) warp_sums[warp] = sum;
    __syncthreads();
    int before = sum - value;
    total = 0;
#pragma unroll
    for (int other = 0; other < kNumWarps; ++other) {
        if (other < warp) before += warp_sums[other];
        total += warp_sums[other];
    }
    __syncthreads();
    return before;
}

// Counts the tokens for one rank, writes what the handle tells of them, lists the first of them in the stage, and tells
// the counts. Called by all threads of a block.
__device__ __forceinline__ void count_tokens(const DispatchParams& p, int dst, unsigned long long epoch,
                                             int* warp_sums) {
    const DispatchStage stage(p, p.places.team.rank);
    const int num_ranks = p.places.team.num_ranks, thread_idx = static_cast<int>(threadIdx.x);
    const int per_channel = tokens_per_channel(p.num_tokens, p.num_channels);
    int* channel_ends = p.channel_prefix_matrix + static_cast<long long>(dst) * p.num_channels;
    int num_before = 0;
    for (int first = 0; first < p.num_tokens; first += kNumThreads * kThreadTokens) {
        const int begin = first + thread_idx * kThreadTokens, end = min(begin + kThreadTokens, p.num_tokens);
        unsigned is_sent = 0;
#pragma unroll
        for (int i = 0; i < kThreadTokens; ++i)
            if (begin + i < end && p.is_token_in_rank[static_cast<long long>(begin + i) * num_ranks + dst])
                is_sent |= 1u << i;
        int num_here;
        const int position = num_before + sum_before(__popc(is_sent), warp_sums, num_here);
        for (int token = begin, next = position; token < end; ++token) {
            if (token > 0 && token % per_channel == 0) channel_ends[token / per_channel - 1] = next;
            if (token == p.num_slots) *stage.list_end(dst) = next;
            if ((is_sent >> (token - begin) & 1) == 0) continue;
            if (token < p.num_slots) *stage.listed(dst, next) = token;
            ++next;
        }
        // A channel may have begun at a token of another thread.
        __syncthreads();
        for (int token = begin, next = position; token < end; ++token) {
            const int channel = token / per_channel;
            const int start = channel == 0 ? 0 : channel_ends[channel - 1];
            const bool is_token_sent = (is_sent >> (token - begin) & 1) != 0;
            p.send_head[static_cast<long long>(token) * num_ranks + dst] = is_token_sent ? next++ - start : -1;
        }
        num_before += num_here;
    }
    // Channels that end where the tokens do, or have none.
    for (int channel = thread_idx; channel < p.num_channels; channel += kNumThreads)
        if (static_cast<long long>(channel + 1) * per_channel >= p.num_tokens) channel_ends[channel] = num_before;
    if (thread_idx == 0 && p.num_tokens <= p.num_slots) *stage.list_end(dst) = num_before;

    const unsigned long long claimed = static_cast<unsigned>(p.num_tokens_per_rank[dst]);
    for (int peer = thread_idx; peer < num_ranks; peer += kNumThreads)
        comm::send_message(&count_slots(p.places, peer, p.places.team.rank, epoch)[dst],
                           static_cast<unsigned>(num_before) | claimed << 32, epoch);
    const int num_local_experts = p.num_experts / num_ranks;
    for (int local = thread_idx; local < num_local_experts; local += kNumThreads)
        comm::send_message(&count_slots(p.places, dst, p.places.team.rank, epoch)[num_ranks + local],
                           static_cast<unsigned>(p.num_tokens_per_expert[dst * num_local_experts + local]), epoch);
}

// What a rank says of the tokens that it sends to another one.
struct Claim {
    int peer, dst;            // the two ranks; peer is negative where there is no claim
    unsigned count, claimed;  // by its routing, and by its `num_tokens_per_rank`
};

// Receives the counts of all ranks, behind their openings. Called by all threads of one block. False, in all of them
// and on all ranks, if the counts are wrong; that is in the record.
[[nodiscard]] __device__ __forceinline__ bool receive_counts(const DispatchParams& p, unsigned long long epoch,
                                                             PlanShared& shared) {
    const int num_ranks = p.places.team.num_ranks, num_local_experts = p.num_experts / num_ranks;
    const int num_each = num_ranks + num_local_experts, thread_idx = static_cast<int>(threadIdx.x);
    for (int local = thread_idx; local < num_local_experts; local += kNumThreads) shared.num_selections[local] = 0;
    __syncthreads();
    bool has_come = true;
    Claim wrong{-1, 0, 0, 0};
    for (int i = thread_idx; i < num_ranks * num_each; i += kNumThreads) {
        const int sender = i / num_each, place = i % num_each;
        const int peer = comm::group_rank(p.places.team, sender);
        const comm::ReceivedMessage message = comm::wait_message(
            &count_slots(p.places, p.places.team.rank, sender, epoch)[place], epoch, p.places.wait, kPhaseCount, peer);
        if (!message.has_come) {
            has_come = false;
            break;
        }
        const unsigned count = static_cast<unsigned>(message.payload);
        if (place >= num_ranks) {
            atomicAdd(&shared.num_selections[place - num_ranks], static_cast<int>(count));
            continue;
        }
        shared.num_sent[sender * num_ranks + place] = static_cast<int>(count);
        const unsigned claimed = static_cast<unsigned>(message.payload >> 32);
        if (claimed != count) wrong = Claim{peer, place, count, claimed};
    }
    // Only now: blocks of this rank that saw a report would not send their counts, which peers wait for.
    if (__syncthreads_and(has_come) == 0) return false;
    bool is_right = wrong.peer < 0;
    // The rank that is counted stands where a wait would tell its length.
    if (!is_right)
        comm::report_timeout(p.places.wait, kPhaseClaim, wrong.peer, wrong.count, wrong.claimed,
                             static_cast<unsigned>(wrong.dst));
    if (__syncthreads_and(is_right) == 0) return false;
    for (int dst = thread_idx; dst < num_ranks; dst += kNumThreads) {
        int end = 0;
        for (int src = 0; src < num_ranks; ++src) {
            end += shared.num_sent[src * num_ranks + dst];
            p.rank_prefix_matrix[src * num_ranks + dst] = end;
        }
        shared.num_recv[dst] = end;
        const unsigned num_worst = shared.peers.num_worst_tokens[dst];
        if (num_worst == 0 || static_cast<unsigned>(end) <= num_worst) continue;
        comm::report_timeout(p.places.wait, kPhaseWorst, comm::group_rank(p.places.team, dst),
                             static_cast<unsigned>(end), num_worst, 0);
        is_right = false;
    }
    return __syncthreads_and(is_right) != 0;
}

// Tells the host the counts, and the second kernel how many tokens there are. Called by all threads of one block.
__device__ __forceinline__ void tell_counts(const DispatchParams& p, const PlanShared& shared) {
    const int num_ranks = p.places.team.num_ranks, num_local_experts = p.num_experts / num_ranks;
    const int thread_idx = static_cast<int>(threadIdx.x);
    for (int rank = thread_idx; rank < num_ranks; rank += kNumThreads)
        p.places.state->num_tokens[rank] = shared.peers.num_tokens[rank];
    if (p.host_counts == nullptr) return;
    for (int local = thread_idx; local < num_local_experts; local += kNumThreads)
        p.host_counts[2 + local] =
            (shared.num_selections[local] + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
    if (thread_idx == 0) p.host_counts[1] = shared.num_recv[p.places.team.rank];
    __syncthreads();
    // The host looks for the stamp without any CUDA call.
    if (thread_idx == 0) ptx::st_release<ptx::Scope::kSys>(p.host_counts, p.host_stamp);
}

// The kernel's body. A timeout or a disagreement is in the record, and the second kernel then does nothing.
template <DispatchConfig kConfig>
__device__ __forceinline__ void plan_dispatch(const DispatchParams& p) {
    __shared__ PlanShared shared;
    RankState* state = p.places.state;
    const unsigned long long epoch = state->epoch + 1;
    // Counts that belong to no opening would be taken for those of the next one. A block may see a failure that the
    // first one has found meanwhile: then no rank receives counts, or this rank has sent all, see `receive_counts`.
    if (opens(p.places)) {
        if (blockIdx.x == 0) send_opening(p.places, p.opening, epoch, 0);
        for (int dst = static_cast<int>(blockIdx.x); dst < p.places.team.num_ranks; dst += static_cast<int>(gridDim.x))
            count_tokens(p, dst, epoch, shared.warp_sums);
        if (blockIdx.x == 0 && receive_openings(p.places, p.opening, epoch, 0, shared.peers) &&
            receive_counts(p, epoch, shared))
            tell_counts(p, shared);
        // The host makes the results meanwhile.
        stage_tokens<typename IndexOf<kConfig.is_idx64>::Type>(p, 0);
    }
    if (leave(state) && threadIdx.x == 0 && state->has_opened != 0) state->epoch = epoch;
}

}  // namespace deep_ep_legacy::normal
