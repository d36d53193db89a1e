// The opening of an operation across nodes: every rank tells every other its arguments, its memory, and its counts.
//
// Each rank puts its slot to the ranks of its rail and stores it at the ranks of its node; a rank that gets a slot over
// the rail stores it at the others of its node. So a slot crosses the network once a node, and every rank has those of
// all ranks in the end, at the same offsets. It means what an opening in one node means (`opening.cuh`): arguments are
// compared before anything moves, and the memory that was told is free.
#pragma once

#include <deep_ep_ep/network/gin_relay.cuh>

namespace deep_ep_ep {

inline constexpr int kExchangeThreads = 512;

struct ExchangeParams {
    Network net;
    Opening opening;
    int num_counts;  // words behind the opening; they are in this rank's own slot already
};

struct ExchangeCall {
    GinAccess gin;
    ExchangeParams call;
};

// What the threads share.
struct ExchangeShared {
    int ready[kExchangeThreads];  // nodes whose slot has come and is to be handed on
    int num_ready;
    int is_over;  // a wait has expired
};

// Stores the slot of a rank, which is in this rank's window, at the other ranks of the node. Called by all threads.
__device__ __forceinline__ void copy_slot_in_node(const Network& net, int source, unsigned long long epoch,
                                                  unsigned long long num_bytes) {
    const unsigned long long offset = slot_offset(net, source, epoch);
    const uint4* from = comm::window_pointer<const uint4>(net.team, net.team.rank, offset);
    const int num_vectors = static_cast<int>(num_bytes / 16);
    for (int step = 1; step < net.team.num_ranks; ++step) {
        const int peer = (net.team.rank + step) % net.team.num_ranks;
        uint4* to = comm::window_pointer<uint4>(net.team, peer, offset);
        for (int i = static_cast<int>(threadIdx.x); i < num_vectors; i += kExchangeThreads) to[i] = from[i];
    }
}

// Hands on the slots that come over the rail, in the order in which they come: none waits for another. Called by all
// threads. A rank that does not come is in the record.
__device__ __forceinline__ void hand_on_slots(const GinAccess& access, const Network& net, ExchangeShared& shared,
                                              unsigned long long epoch, unsigned long long num_bytes) {
    const ncclGin gin(access.dev_comm, 0);
    const int thread_idx = static_cast<int>(threadIdx.x), own = own_node(net), num = num_nodes(net);
    const int num_local = net.team.num_ranks;
    unsigned done = 0;  // bit j: the slot of node thread_idx + j * kExchangeThreads
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    if (thread_idx == 0) shared.is_over = 0;
    for (int num_done = 0; num_done < num - 1;) {
        __syncthreads();
        if (thread_idx == 0) shared.num_ready = 0;
        __syncthreads();
        int late = -1;
        for (int node = thread_idx, bit = 0; node < num; node += kExchangeThreads, ++bit) {
            if (node == own || (done >> bit & 1) != 0) continue;
            const int source = node * num_local + net.team.rank;
            if (gin.readSignal(access.window, word_offset(net, kWordOpening, source)) < epoch) {
                late = source;
                continue;
            }
            const int place = atomicAdd(&shared.num_ready, 1);
            if (place < kExchangeThreads) {
                shared.ready[place] = node;
                done |= 1u << bit;
            }
        }
        if (late >= 0) {
            const unsigned long long waited_ns = ptx::globaltimer_ns() - begin_ns;
            if (static_cast<long long>(waited_ns) >= static_cast<long long>(net.wait.timeout_ns))
                comm::report_timeout(net.wait, kPhaseOpen, late, epoch, epoch - 1, waited_ns);
            if (comm::has_expired(net.wait)) shared.is_over = 1;
        }
        __syncthreads();
        const int num_ready = min(shared.num_ready, kExchangeThreads);
        for (int i = 0; i < num_ready; ++i)
            copy_slot_in_node(net, shared.ready[i] * num_local + net.team.rank, epoch, num_bytes);
        __syncthreads();
        for (int i = thread_idx; i < num_ready * num_local; i += kExchangeThreads)
            comm::publish_flag(word_at(net, i % num_local, kWordOpened,
                                       shared.ready[i / num_local] * num_local + net.team.rank),
                               epoch);
        num_done += num_ready;
        if (num_ready == 0 && shared.is_over != 0) return;
    }
}

// Compares the opening of a rank with this rank's. Called by one thread. A difference is in the record.
__device__ __forceinline__ void compare_opening(const Network& net, const Opening& ours, int source,
                                                unsigned long long epoch) {
    const Opening& theirs = opening_of(net, source, epoch);
    for (int value_idx = 0; value_idx < kNumAgreed; ++value_idx) {
        if (theirs.agreed[value_idx] == ours.agreed[value_idx]) continue;
        // The place of the value stands where a wait would tell its length.
        const unsigned phase_idx = value_idx == kInvalidToken ? kPhaseInvalid : kPhaseDisagree;
        comm::report_timeout(net.wait, phase_idx, source, ours.agreed[value_idx], theirs.agreed[value_idx], value_idx);
    }
}

// Waits for the slots of all ranks, and compares. Called by all threads.
//
// The ranks of the node come first: if one of them is late, it is late as a relay too, and the ranks whose slots it
// should hand on must not be blamed.
__device__ __forceinline__ void receive_slots(const Network& net, const Opening& opening, unsigned long long epoch) {
    const auto wait_for = [&net, epoch](int source) {
        return comm::wait_flag(word_at(net, net.team.rank, kWordOpened, source), epoch, net.wait, kPhaseOpen, source);
    };
    bool is_right = true;
    for (int i = static_cast<int>(threadIdx.x); i < net.team.num_ranks; i += kExchangeThreads)
        is_right &= wait_for(comm::group_rank(net.team, i));
    if (__syncthreads_and(is_right) == 0) return;
    for (int source = static_cast<int>(threadIdx.x); source < net.num_ranks; source += kExchangeThreads)
        if (wait_for(source)) compare_opening(net, opening, source, epoch);
}

// The kernel's body, for one block of `kExchangeThreads`. A late rank or a disagreement is in the record, and whatever
// follows in the stream must look there before it does anything.
__device__ __forceinline__ void exchange(const ExchangeCall& c) {
    const Network& net = c.call.net;
    __shared__ ExchangeShared shared;
    // Behind a failure nothing is opened or counted: of hosts that were told in time, none is here.
    if (__syncthreads_or(threadIdx.x == 0 && comm::has_expired(net.wait)) != 0) {
        if (threadIdx.x == 0) net.state->invalid_token = 0;
        return;
    }
    const unsigned long long epoch = net.state->epoch + 1;
    const unsigned long long offset = slot_offset(net, own_rank(net), epoch);
    const unsigned long long num_bytes = (sizeof(Opening) + 4ull * c.call.num_counts + 15) / 16 * 16;
    if (threadIdx.x == 0) {
        Opening own = c.call.opening;
        own.agreed[kInvalidToken] = net.state->invalid_token;
        *comm::window_pointer<Opening>(net.team, net.team.rank, offset) = own;
    }
    __syncthreads();
    // What the block wrote, and kernels before it, goes with the puts.
    ptx::fence_acq_rel<ptx::Scope::kSys>();
    const ncclTeam rail = ncclTeamRail(c.gin.dev_comm);
    for (int step = 1; step < num_nodes(net); ++step)
        put_and_signal(c.gin, net, 0, rail, (own_node(net) + step) % num_nodes(net), offset, offset, num_bytes,
                       kWordOpening, ncclCoopCta());
    copy_slot_in_node(net, own_rank(net), epoch, num_bytes);
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < net.team.num_ranks; i += kExchangeThreads)
        comm::publish_flag(word_at(net, i, kWordOpened, own_rank(net)), epoch);
    hand_on_slots(c.gin, net, shared, epoch, num_bytes);
    receive_slots(net, c.call.opening, epoch);
    __syncthreads();
    if (threadIdx.x == 0) {
        net.state->invalid_token = 0;
        net.state->epoch = epoch;
    }
}

}  // namespace deep_ep_ep
