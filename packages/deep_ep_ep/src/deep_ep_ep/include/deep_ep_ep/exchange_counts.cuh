// The exchange of counts: each rank tells every other how many of its tokens select each rank and each expert, so that
// every sender knows the last row of every token it sends.
//
// A message carries two columns. The slots are in each rank's window: by the parity of the operation's epoch, the
// sender, and the pair of columns. They follow the openings' epochs; what makes two slots enough for those holds here.
#pragma once

#include <deep_ep_ep/dispatch_params.cuh>

namespace deep_ep_ep {

__device__ __forceinline__ comm::Message* count_slots(const DispatchParams& p, int at_rank, int sender,
                                                      unsigned long long epoch) {
    const long long slot = (static_cast<long long>(epoch % 2) * p.team.num_ranks + sender) * p.counts_capacity;
    return comm::window_pointer<comm::Message>(p.team, at_rank, p.counts_offset) + slot;
}

// Sends this rank's counts to the ranks that fall to this block. Called by all threads of each block.
__device__ __forceinline__ void send_counts(const DispatchParams& p, const unsigned* counts,
                                            unsigned long long epoch) {
    const int columns = num_columns(p), num_pairs = (columns + 1) / 2;
    for (int peer = static_cast<int>(blockIdx.x); peer < p.team.num_ranks; peer += static_cast<int>(gridDim.x)) {
        comm::Message* slots = count_slots(p, peer, p.team.rank, epoch);
        for (int pair = static_cast<int>(threadIdx.x); pair < num_pairs; pair += kNumThreads) {
            const unsigned long long low = counts[2 * pair];
            const unsigned long long high = 2 * pair + 1 < columns ? counts[2 * pair + 1] : 0;
            comm::send_message(&slots[pair], low | high << 32, epoch);
        }
    }
}

// Receives the counts of all ranks. Called by all threads of each block; `totals`, `before_us` [num_columns] and
// `recv_counts` [num_ranks] are in shared memory.
//
// totals: tokens of all ranks that select a column; before_us: those of the ranks before this one.
// recv_counts: rows that each rank sends to this one.
//
// Returns, in all threads of the block alike, whether all have come. Behind it all threads may read the sums.
[[nodiscard]] __device__ __forceinline__ bool receive_counts(const DispatchParams& p, unsigned long long epoch,
                                                             unsigned* totals, unsigned* before_us,
                                                             int* recv_counts) {
    const int columns = num_columns(p), num_pairs = (columns + 1) / 2;
    for (int column = static_cast<int>(threadIdx.x); column < columns; column += kNumThreads)
        totals[column] = before_us[column] = 0;
    __syncthreads();
    bool have_come = true;
    for (int i = static_cast<int>(threadIdx.x); i < p.team.num_ranks * num_pairs; i += kNumThreads) {
        const int sender = i / num_pairs, pair = i % num_pairs;
        const comm::Message* slot = &count_slots(p, p.team.rank, sender, epoch)[pair];
        const comm::ReceivedMessage message =
            comm::wait_message(slot, epoch, p.wait, kPhaseCount, comm::group_rank(p.team, sender));
        if (!message.has_come) {
            have_come = false;
            break;
        }
        for (int half = 0; half < 2; ++half) {
            const int column = 2 * pair + half;
            if (column >= columns) break;
            const unsigned count = static_cast<unsigned>(message.payload >> (32 * half));
            if (count != 0) {
                atomicAdd(&totals[column], count);
                if (sender < p.team.rank) atomicAdd(&before_us[column], count);
            }
            if (column == p.team.rank) recv_counts[sender] = static_cast<int>(count);
        }
    }
    return __syncthreads_and(have_come) != 0;
}

}  // namespace deep_ep_ep
