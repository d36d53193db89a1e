// The last part of a combine across nodes: waits for what comes back, and sums it up for each token.
#pragma once

#include <deep_ep_ep/network/forward_rows.cuh>

namespace deep_ep_ep {

template <bool kHasWideIdx>
__device__ __forceinline__ int rank_of_entry(const NetworkCombineParams& p, long long entry) {
    const long long expert = kHasWideIdx ? static_cast<const long long*>(p.topk_idx)[entry]
                                         : static_cast<const int*>(p.topk_idx)[entry];
    return expert < 0 ? -1 : static_cast<int>(expert) / (p.num_experts / p.net.num_ranks);
}

// For each token: the sum of the biases and of the rows that came back for it, in ascending order of the last entries
// that they stand for.
template <bool kHasWideIdx>
class ReturnJobs {
   public:
    struct Entry {
        int rank;  // that serves this lane's entry, or -1
        int row;   // >= 0: a row came back for it
    };

    __device__ __forceinline__ ReturnJobs(const NetworkCombineParams& p, int lane) : p_(p), lane_(lane) {}

    __device__ __forceinline__ Entry load(int token) const {
        if (lane_ >= p_.num_topk) return Entry{-1, -1};
        const long long entry = static_cast<long long>(token) * p_.num_topk + lane_;
        const int rank = rank_of_entry<kHasWideIdx>(p_, entry);
        if (p_.is_single_rounding) return Entry{rank, rank};
        return Entry{rank, (p_.is_hierarchical ? p_.slot_of_entry : p_.row_of_entry)[entry]};
    }

    __device__ __forceinline__ RowJob make(const Entry& entry, int token, RowLists& lists, bool) const {
        const long long offset = static_cast<long long>(token) * p_.row_bytes;
        int num_biases = 0;
#pragma unroll
        for (int i = 0; i < kMaxBiases; ++i) {
            if (p_.biases[i] == nullptr) continue;
            if (lane_ == 0) lists.rows[num_biases] = static_cast<const char*>(p_.biases[i]) + offset;
            ++num_biases;
        }
        const unsigned have_rows = __ballot_sync(kAllLanes, entry.row >= 0);
        if (entry.row >= 0) {
            const long long place = p_.is_hierarchical
                                        ? return_of_slot(p_, relay_of(p_.net, entry.rank), entry.row)
                                        : return_of_entry(p_, token, entry.rank, lane_);
            lists.rows[num_biases + __popc(have_rows & ((1u << lane_) - 1))] =
                own_place<const char>(p_, return_place(p_, place));
        }
        if (lane_ == 0) lists.outs[0] = static_cast<char*>(p_.out) + offset;
        RowJob job;
        job.num_rows = num_biases + __popc(have_rows);
        return job;
    }

   private:
    const NetworkCombineParams& p_;
    int lane_;
};

// Puts that a relay sends back to this rank.
__device__ __forceinline__ unsigned num_puts_back(const NetworkCombineParams& p, int relay) {
    const auto count = [&p, relay](RelayCount row) {
        return p.relay_counts[static_cast<long long>(row) * p.net.num_ranks + relay];
    };
    return static_cast<unsigned>(p.is_hierarchical ? num_chunks(count(kRelaySent), p.chunk_rows) : count(kRelayBack));
}

// Waits for all that comes back and, in the first block, until the ranks of the node have read this rank's rows. Called
// by all threads of each block; the same answer in all of them.
[[nodiscard]] __device__ __forceinline__ bool wait_for_returns(const NetworkCombineCall& c) {
    const NetworkCombineParams& p = c.call;
    const Network& net = p.net;
    bool have_come = !comm::has_expired(net.wait);
    for (int relay = static_cast<int>(threadIdx.x); have_come && relay < num_relays(net);
         relay += static_cast<int>(blockDim.x)) {
        const unsigned num_puts = num_puts_back(p, relay);
        const int rank = relay_rank(net, relay);
        if (relay != own_relay(net) && num_puts > 0)
            have_come = wait_for_puts(c.gin, net, kWordReturned, rank, total_of(net, kWordReturned, rank) + num_puts,
                                      kPhasePush);
    }
    for (int i = static_cast<int>(threadIdx.x); blockIdx.x == 0 && have_come && i < net.team.num_ranks;
         i += static_cast<int>(blockDim.x))
        have_come = comm::wait_flag(word_at(net, net.team.rank, kWordRead, i), total_of(net, kWordRead, i) + 1,
                                    net.wait, kPhasePull, comm::group_rank(net.team, i));
    return __syncthreads_and(have_come) != 0;
}

// Writes the weights of some tokens: of each entry what came back with the row that stands for it, 0 where there is
// none. Called by all threads of a block.
template <bool kHasWideIdx>
__device__ __forceinline__ void gather_returned_weights(const NetworkCombineParams& p, const Part& tokens) {
    const long long end = tokens.end * p.num_topk;
    for (long long entry = tokens.begin * p.num_topk + threadIdx.x; entry < end; entry += blockDim.x) {
        const int token = static_cast<int>(entry / p.num_topk), k = static_cast<int>(entry % p.num_topk);
        const int rank = rank_of_entry<kHasWideIdx>(p, entry);
        float weight = 0;
        if (rank >= 0) {
            const int relay = relay_of(p.net, rank);
            long long place = 0;
            // The last entry of the rank, or of the relay, is this one or a later one.
            for (int later = k; later < p.num_topk; ++later) {
                const int other = rank_of_entry<kHasWideIdx>(p, entry - k + later);
                if (other < 0) continue;
                if (!p.is_hierarchical && other == rank) place = return_of_entry(p, token, rank, later);
                if (p.is_hierarchical && relay_of(p.net, other) == relay && p.slot_of_entry[entry - k + later] >= 0)
                    place = return_of_slot(p, relay, p.slot_of_entry[entry - k + later]);
            }
            weight = own_place<const float>(p, return_place(p, place) + p.row_bytes)[k];
        }
        p.out_weights[entry] = weight;
    }
}

// The kernel's body, for blocks of `RowRing::kNumWarps` warps and `RowRing::kNumBlockBytes` of dynamic shared memory.
template <NetworkCombineConfig kConfig>
__device__ __forceinline__ void sum_rows_of_tokens(const NetworkCombineCall& c) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ StreamShared shared;
    const NetworkCombineParams& p = c.call;
    const Network& net = p.net;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    RowStream<kConfig.row_type> stream = row_stream<kConfig.row_type>(p, shared, stages);
    bool is_right = wait_for_returns(c);
    if (is_right) {
        const Part tokens = part_of(p.num_tokens, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
        ptx::fence_proxy_async_global();
        is_right = stream.run(ReturnJobs<kConfig.has_wide_idx>(p, lane), tokens);
        if (p.has_weights) gather_returned_weights<kConfig.has_wide_idx>(p, tokens);
    }
    // `is_last_block` meets the threads of the block.
    if (!is_last_block(net.state) || !is_right) return;
    for (int relay = static_cast<int>(threadIdx.x); relay < num_relays(net); relay += static_cast<int>(blockDim.x))
        if (relay != own_relay(net)) total_of(net, kWordReturned, relay_rank(net, relay)) += num_puts_back(p, relay);
    for (int i = static_cast<int>(threadIdx.x); i < net.team.num_ranks; i += static_cast<int>(blockDim.x))
        total_of(net, kWordRead, i) += 1;
}

}  // namespace deep_ep_ep
