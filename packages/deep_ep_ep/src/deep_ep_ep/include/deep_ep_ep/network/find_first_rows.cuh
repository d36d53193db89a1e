// From the counts of all ranks: where this rank's tokens begin at every receiver, what comes to this rank, and what the
// handle and the host are told.
#pragma once

#include <deep_ep_ep/network/dispatch_params.cuh>

namespace deep_ep_ep {

// Sum of the values of the lanes up to this one. Called by all lanes of a warp.
__device__ __forceinline__ int sum_of_lanes_up_to(int value) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, value, step);
        if (lane >= step) value += other;
    }
    return value;
}

// The rows of one rank's experts. Called by all lanes of a warp.
__device__ __forceinline__ void find_expert_rows(const NetworkDispatchParams& p, unsigned long long epoch, int rank) {
    const Network& net = p.net;
    const DispatchParams& local = p.local;
    const int lane = static_cast<int>(threadIdx.x) % 32, us = own_rank(net);
    const int num_local_experts = local.num_experts / net.num_ranks;
    int next = 0;
    for (int first = 0; first < num_local_experts; first += 32) {
        const int expert = first + lane;
        const bool is_expert = expert < num_local_experts;
        const int column = net.num_ranks + rank * num_local_experts + expert;
        int total = 0, before_us = 0;
        for (int source = 0; is_expert && source < net.num_ranks; ++source) {
            const int count = static_cast<int>(counts_of(net, source, epoch)[column]);
            total += count;
            if (source < us) before_us += count;
        }
        const int aligned = align_up(total, local.expert_alignment);
        const int end = next + sum_of_lanes_up_to(aligned);
        next = __shfl_sync(0xffffffffu, end, 31);
        if (!is_expert) continue;
        p.first_rows[column] = static_cast<unsigned>(end - aligned + before_us);
        if (rank != us) continue;
        local.expert_ends[expert] = local.do_expand ? end - aligned + total : end;
        local.num_expert_rows[expert] = total;
        if (local.recv_stats != nullptr) local.recv_stats[expert] += total;
        if (local.host_counts != nullptr) local.host_counts[2 + expert] = aligned;
    }
}

// What comes to this rank, by source. Called by all lanes of a warp.
__device__ __forceinline__ void sum_received(const NetworkDispatchParams& p, unsigned long long epoch) {
    const Network& net = p.net;
    const int lane = static_cast<int>(threadIdx.x) % 32, us = own_rank(net);
    int next = 0;
    for (int first = 0; first < net.num_ranks; first += 32) {
        const int source = first + lane;
        const int count = source < net.num_ranks ? static_cast<int>(counts_of(net, source, epoch)[us]) : 0;
        const int end = next + sum_of_lanes_up_to(count);
        next = __shfl_sync(0xffffffffu, end, 31);
        if (source >= net.num_ranks) continue;
        p.local.recv_row_ends[source] = end;
        if (!net.is_hybrid) p.scaleup_row_ends[source] = end;
    }
    if (p.local.host_counts != nullptr && lane == 0) p.local.host_counts[1] = next;
    if (!net.is_hybrid) return;
    next = 0;
    for (int first = 0; first < net.team.num_ranks; first += 32) {
        const int place = first + lane;
        int count = 0;
        for (int source = place; place < net.team.num_ranks && source < net.num_ranks; source += net.team.num_ranks)
            count += static_cast<int>(counts_of(net, source, epoch)[us]);
        const int end = next + sum_of_lanes_up_to(count);
        next = __shfl_sync(0xffffffffu, end, 31);
        if (place < net.team.num_ranks) p.scaleup_row_ends[place] = end;
    }
}

// What goes through each relay, and comes from each rank to this one as its relay. Called by all lanes of a warp.
__device__ __forceinline__ void count_relayed(const NetworkDispatchParams& p, unsigned long long epoch) {
    const Network& net = p.net;
    const int lane = static_cast<int>(threadIdx.x) % 32, us = own_rank(net);
    const int num_local_experts = p.local.num_experts / net.num_ranks;
    const unsigned* ours = counts_of(net, us, epoch);
    for (int rank = lane; rank < net.num_ranks; rank += 32) p.local.num_send_rows[rank] = static_cast<int>(ours[rank]);
    int next = 0;
    for (int first = 0; first < num_relays(net); first += 32) {
        const int relay = first + lane;
        const bool is_relay = relay < num_relays(net);
        const int sent = is_relay ? static_cast<int>(ours[first_relay_column(p) + relay]) : 0;
        const int end = next + sum_of_lanes_up_to(sent);
        next = __shfl_sync(0xffffffffu, end, 31);
        if (!is_relay) continue;
        relay_counts(p, kRelaySent)[relay] = sent;
        relay_counts(p, kRelaySentBegin)[relay] = end - sent;
        relay_counts(p, kRelayComing)[relay] = static_cast<int>(
            counts_of(net, relay_rank(net, relay), epoch)[first_relay_column(p) + own_relay(net)]);
        int back = 0;
        for (int rank = 0; rank < net.num_ranks; ++rank) {
            if (relay_of(net, rank) != relay) continue;
            const unsigned* of_experts = ours + net.num_ranks + rank * num_local_experts;
            if (!p.is_single_rounding) back += static_cast<int>(ours[rank]);
            for (int i = 0; p.is_single_rounding && i < num_local_experts; ++i) back += static_cast<int>(of_experts[i]);
        }
        relay_counts(p, kRelayBack)[relay] = back;
    }
}

// The kernel's body: a warp a rank. One block, number 0, does the rest, after its share of the ranks; that of this rank
// is in it, since the host is told when all of its counts are there.
__device__ __forceinline__ void find_first_rows_of_ranks(const NetworkDispatchParams& p) {
    const Network& net = p.net;
    if (comm::has_expired(net.wait)) return;
    const unsigned long long epoch = net.state->epoch;
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int us = own_rank(net), num_warps = kPlanThreads / 32;
    // Counted from this rank, which is the first of block 0.
    for (int step = static_cast<int>(blockIdx.x) * num_warps + warp; step < net.num_ranks;
         step += static_cast<int>(gridDim.x) * num_warps) {
        const int rank = (us + step) % net.num_ranks;
        find_expert_rows(p, epoch, rank);
        int before_us = 0;
        for (int source = lane; source < us; source += 32)
            before_us += static_cast<int>(counts_of(net, source, epoch)[rank]);
        before_us = __reduce_add_sync(0xffffffffu, before_us);
        if (lane == 0) p.first_rows[rank] = static_cast<unsigned>(before_us);
    }
    if (blockIdx.x != 0) return;
    if (warp == 0) sum_received(p, epoch);
    if (warp == 1) count_relayed(p, epoch);
    __syncthreads();
    // The host looks for the stamp without any CUDA call.
    if (threadIdx.x == 0 && p.local.host_counts != nullptr)
        ptx::st_release<ptx::Scope::kSys>(&p.local.host_counts[0], p.local.host_stamp);
}

}  // namespace deep_ep_ep
