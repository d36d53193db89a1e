// The half of combine in which a rank sends back: rows that do not lie in its window, and weights always.
//
// A block takes some of the received rows and does all that belongs to each of them, so that its count of rows tells
// the source the truth.
#pragma once

#include <deep_ep_ep/combine_params.cuh>

namespace deep_ep_ep {

// For each received row: the sum of its rows in x, or these one by one, into the slab of its source.
class PushJobs {
   public:
    struct Entry {
        int source_token;  // column 0 of the metadata
        int source_entry;  // column 1
        int row;           // row of x that this lane stands for, or -1
    };

    __device__ __forceinline__ PushJobs(const CombineParams& p, const PeerOpenings& peers, int lane)
        : p_(p), peers_(peers), lane_(lane) {}

    __device__ __forceinline__ Entry load(int recv_row) const {
        const int* metadata = p_.metadata + static_cast<long long>(recv_row) * (p_.num_topk + 2);
        Entry entry{metadata[0], metadata[1], -1};
        if (p_.do_expand) {
            if (lane_ < p_.num_topk) entry.row = metadata[2 + lane_];
        } else if (lane_ == 0) {
            entry.row = recv_row;
        }
        return entry;
    }

    __device__ __forceinline__ RowJob make(const Entry& entry, int, RowLists& lists, bool) const {
        const int source = entry.source_token / p_.num_max_tokens;
        const int token = entry.source_token - source * p_.num_max_tokens;
        int layer = entry.source_entry % p_.num_topk;
        if (Slab::has_layer_of_rank(p_)) layer = p_.team.rank;
        if (p_.is_single_rounding) layer = lane_;
        const bool has_row = entry.row >= 0;
        const unsigned have_rows = __ballot_sync(kAllLanes, has_row);
        if (has_row) {
            // Of a sum only the first place is used, and all are the same.
            const int position = __popc(have_rows & ((1u << lane_) - 1));
            lists.rows[position] = static_cast<const char*>(p_.x) + static_cast<long long>(entry.row) * p_.row_bytes;
            lists.outs[position] = Slab(p_, source, peers_.told[source][1]).row(layer, token);
        }
        RowJob job;
        job.num_rows = __popc(have_rows);
        job.is_copy = p_.is_single_rounding || job.num_rows <= 1;
        return job;
    }

   private:
    const CombineParams& p_;
    const PeerOpenings& peers_;
    int lane_;
};

// Stores the weights of some received rows in the slabs of their sources: K for each row, 0 where an entry is not of
// this rank and x is expert-major. Called by all threads of a block.
__device__ __forceinline__ void push_weights(const CombineParams& p, const PeerOpenings& peers, const Part& recv_rows) {
    constexpr int kBatch = 4;  // so that their loads wait together
    const long long end = recv_rows.end * p.num_topk;
    for (long long first = recv_rows.begin * p.num_topk + threadIdx.x; first < end; first += kBatch * blockDim.x) {
        int source_token[kBatch], source_entry[kBatch], row[kBatch], k[kBatch];
        float weight[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const long long idx = first + i * static_cast<int>(blockDim.x);
            const long long recv_row = idx / p.num_topk;
            k[i] = static_cast<int>(idx - recv_row * p.num_topk);
            source_token[i] = -1;
            source_entry[i] = 0;
            row[i] = -1;
            if (idx < end) {
                const int* metadata = p.metadata + recv_row * (p.num_topk + 2);
                source_token[i] = metadata[0];
                source_entry[i] = metadata[1];
                row[i] = p.do_expand ? metadata[2 + k[i]] : static_cast<int>(recv_row);
            }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            weight[i] = 0;
            if (row[i] >= 0)
                weight[i] = p.weights[p.do_expand ? row[i] : static_cast<long long>(row[i]) * p.num_topk + k[i]];
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (source_token[i] < 0) continue;
            const int source = source_token[i] / p.num_max_tokens;
            const int token = source_token[i] - source * p.num_max_tokens;
            const int layer = Slab::has_layer_of_rank(p) ? p.team.rank : source_entry[i] % p.num_topk;
            Slab(p, source, peers.told[source][1]).weights(layer, token)[k[i]] = weight[i];
        }
    }
}

// Sends back what this rank has to send, and tells each source how much came from this block. Called by all threads of
// each block, behind the opening. False, in all threads of the block, if something did not come in time.
//
// Order: what is pushed is released with the count; the source acquires the sum of the counts of all blocks.
template <RowType kType>
[[nodiscard]] __device__ __forceinline__ bool push(const CombineParams& p, CombineShared& shared,
                                                   RowStream<kType>& stream, int lane) {
    const bool does_push_x = p.opening.told[0] == kPushed;
    if (!does_push_x && !p.has_weights) return true;
    const Part recv_rows = part_of(p.recv_row_ends[p.team.num_ranks - 1], static_cast<int>(blockIdx.x),
                                   static_cast<int>(gridDim.x));
    for (long long row = recv_rows.begin + threadIdx.x; row < recv_rows.end; row += blockDim.x)
        atomicAdd(&shared.num_pushed[p.metadata[row * (p.num_topk + 2)] / p.num_max_tokens], 1);
    if (p.has_weights) push_weights(p, shared.peers, recv_rows);
    bool is_right = true;
    if (does_push_x) is_right = stream.run(PushJobs(p, shared.peers, lane), recv_rows);
    // All stores of the block stand before the releases of the threads below.
    if (__syncthreads_and(is_right) == 0) return false;
    for (int peer = static_cast<int>(threadIdx.x); peer < p.team.num_ranks; peer += static_cast<int>(blockDim.x)) {
        const int num_rows = shared.num_pushed[peer];
        Arrivals* arrivals = comm::window_pointer<Arrivals>(p.team, peer, p.arrivals_offset);
        if (num_rows > 0)
            comm::raise_flag(&arrivals->num_pushed[p.team.rank], static_cast<unsigned long long>(num_rows));
    }
    return true;
}

}  // namespace deep_ep_ep
