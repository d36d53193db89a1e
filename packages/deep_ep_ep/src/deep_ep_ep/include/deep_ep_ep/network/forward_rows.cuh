// The relay's half of a combine across nodes: for each record that was handed on in the dispatch, reads the rows of the
// ranks behind this one, adds them up or takes them as they are, and puts them back to the token's rank.
//
// With partial sums of nodes one row goes back a record, and a chunk of records at once. Otherwise every row goes by
// itself, to its own place. Rows of this rank's own tokens go to the same slab, without the network.
#pragma once

#include <deep_ep_ep/network/combine_params.cuh>
#include <deep_ep_ep/network/place_rows.cuh>

namespace deep_ep_ep {

struct NetworkCombineCall {
    GinAccess gin;
    NetworkCombineParams call;
};

// What the forward table says of an entry, to the lane that stands for it.
struct ForwardEntry {
    int token;
    int row;       // -1: not of a rank behind this one
    int lsa_rank;  // whose row it is
    bool is_last;  // it stands for its rank's entries
};

__device__ __forceinline__ ForwardEntry load_forward_entry(const NetworkCombineParams& p, int relay, int slot,
                                                           int lane) {
    const int* record = p.forward_table + return_of_slot(p, relay, slot) * forward_table_words(p.num_topk);
    ForwardEntry entry{record[0], -1, 0, false};
    if (lane >= p.num_topk) return entry;
    const int owner = record[1 + p.num_topk + lane];
    entry.row = record[1 + lane];
    entry.lsa_rank = owner >> 1;
    entry.is_last = entry.row >= 0 && (owner & 1) != 0;
    return entry;
}

// Where the row that an entry stands for goes in this rank's window. `idx`: the how-manieth of its record it is.
__device__ __forceinline__ unsigned long long forward_place(const NetworkCombineParams& p, int relay, int slot,
                                                            const ForwardEntry& entry, int k, int idx) {
    if (relay != own_relay(p.net)) return send_place(p, relay, slot, idx);
    if (p.is_hierarchical) return return_place(p, return_of_slot(p, relay, slot));
    return return_place(p, return_of_entry(p, entry.token, comm::group_rank(p.net.team, entry.lsa_rank), k));
}

// For each record of a relay: its rows one by one, or their sum.
class ForwardJobs {
   public:
    using Entry = ForwardEntry;

    __device__ __forceinline__ ForwardJobs(const NetworkCombineParams& p, int relay, unsigned long long epoch, int lane)
        : p_(p), relay_(relay), epoch_(epoch), lane_(lane) {}

    __device__ __forceinline__ Entry load(int slot) const { return load_forward_entry(p_, relay_, slot, lane_); }

    __device__ __forceinline__ RowJob make(const Entry& entry, int slot, RowLists& lists, bool) const {
        const unsigned lasts = __ballot_sync(kAllLanes, entry.is_last);
        if (entry.is_last) {
            const int idx = __popc(lasts & ((1u << lane_) - 1));
            const int rank = comm::group_rank(p_.net.team, entry.lsa_rank);
            lists.rows[idx] = comm::window_pointer<const char>(
                p_.net.team, entry.lsa_rank,
                opening_of(p_.net, rank, epoch_).told[0] + static_cast<long long>(entry.row) * p_.row_bytes);
            // Of a sum only the first place is used, and all are the same.
            lists.outs[idx] = own_place<char>(p_, forward_place(p_, relay_, slot, entry, lane_, idx));
        }
        RowJob job;
        job.num_rows = __popc(lasts);
        job.is_copy = !p_.is_hierarchical;
        return job;
    }

   private:
    const NetworkCombineParams& p_;
    int relay_;
    unsigned long long epoch_;
    int lane_;
};

// Writes the weights behind the rows of a chunk: of a sum those of all entries behind this rank, of a single row those
// of its rank. Called by all threads, a warp a record.
__device__ __forceinline__ void forward_weights(const NetworkCombineParams& p, const Chunk& chunk,
                                                unsigned long long epoch) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int slot = chunk.begin + warp; slot < chunk.end; slot += RowRing::kNumWarps) {
        const ForwardEntry entry = load_forward_entry(p, chunk.relay, slot, lane);
        float weight = 0;
        if (entry.row >= 0) {
            const int rank = comm::group_rank(p.net.team, entry.lsa_rank);
            weight = comm::window_pointer<const float>(
                p.net.team, entry.lsa_rank,
                opening_of(p.net, rank, epoch).told[1])[static_cast<long long>(entry.row) * p.num_topk + lane];
        }
        unsigned lasts = __ballot_sync(kAllLanes, entry.is_last);
        // Of a sum the first place is that of all.
        if (p.is_hierarchical) lasts &= ~(lasts - 1);
        const unsigned long long place =
            forward_place(p, chunk.relay, slot, entry, lane, __popc(lasts & ((1u << lane) - 1)));
        for (unsigned rest = lasts; rest != 0; rest &= rest - 1) {
            const int source_lane = __ffs(static_cast<int>(rest)) - 1;
            const unsigned long long to = __shfl_sync(kAllLanes, place, source_lane);
            if (lane < p.num_topk) own_place<float>(p, to + p.row_bytes)[lane] = weight;
        }
    }
}

// Puts back the rows of a chunk. Called by all threads of the block, behind its fence.
__device__ __forceinline__ void put_back(const NetworkCombineCall& c, const Chunk& chunk, long long chunk_idx) {
    const NetworkCombineParams& p = c.call;
    const int us_as_relay = own_relay(p.net);
    if (p.is_hierarchical) {
        put_to_relay(c.gin, p.net, chunk_idx, chunk.relay, return_place(p, return_of_slot(p, us_as_relay, chunk.begin)),
                     send_place(p, chunk.relay, chunk.begin, 0),
                     static_cast<unsigned long long>(chunk.end - chunk.begin) * p.return_bytes, kWordReturned,
                     ncclCoopCta());
        return;
    }
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int slot = chunk.begin + warp; slot < chunk.end; slot += RowRing::kNumWarps) {
        const ForwardEntry entry = load_forward_entry(p, chunk.relay, slot, lane);
        const unsigned lasts = __ballot_sync(kAllLanes, entry.is_last);
        if (!entry.is_last) continue;
        const int rank = comm::group_rank(p.net.team, entry.lsa_rank);
        const unsigned long long from =
            send_place(p, chunk.relay, slot, __popc(lasts & ((1u << lane) - 1)));
        put_to_relay(c.gin, p.net, chunk_idx, chunk.relay,
                     return_place(p, return_of_entry(p, entry.token, rank, lane)), from, p.return_bytes, kWordReturned,
                     ncclCoopThread());
    }
}

// The kernel's body, for blocks of `RowRing::kNumWarps` warps and `RowRing::kNumBlockBytes` of dynamic shared memory.
template <NetworkCombineConfig kConfig>
__device__ __forceinline__ void forward_rows_to_sources(const NetworkCombineCall& c) {
    extern __shared__ __align__(128) unsigned char stages[];
    __shared__ StreamShared shared;
    const NetworkCombineParams& p = c.call;
    const Network& net = p.net;
    if (comm::has_expired(net.wait)) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const unsigned long long epoch = net.state->epoch;
    const int* num_rows = p.relay_counts + static_cast<long long>(kRelayComing) * net.num_ranks;
    RowStream<kConfig.row_type> stream = row_stream<kConfig.row_type>(p, shared, stages);
    // Ranks of the node wrote by plain stores what bulk copies will read.
    ptx::fence_proxy_async_global();
    for (long long idx = blockIdx.x;; idx += gridDim.x) {
        const Chunk chunk = chunk_of(net, num_rows, p.chunk_rows, idx);
        if (chunk.relay < 0) break;
        const bool is_done =
            stream.run(ForwardJobs(p, chunk.relay, epoch, lane), Part{chunk.begin, chunk.end});
        if (p.has_weights) forward_weights(p, chunk, epoch);
        if (__syncthreads_and(is_done) == 0) return;
        if (chunk.relay == own_relay(net)) continue;
        ptx::fence_acq_rel<ptx::Scope::kSys>();
        put_back(c, chunk, idx);
    }
    // The ranks of the node may write over their rows when all that read them have said so.
    if (!is_last_block(net.state)) return;
    for (int i = static_cast<int>(threadIdx.x); i < net.team.num_ranks; i += static_cast<int>(blockDim.x))
        comm::raise_flag(word_at(net, i, kWordRead, net.team.rank), 1ull);
}

}  // namespace deep_ep_ep
