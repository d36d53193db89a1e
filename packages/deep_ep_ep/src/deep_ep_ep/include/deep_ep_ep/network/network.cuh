// What all kernels across nodes are passed: who reaches whom, and where control memory lies. Mirrored in
// `deep_ep_ep.device.network.params`.
//
// The ranks of an LSA team, a node here, reach each other by load and store; between nodes goes GIN. What a rank sends
// to other nodes it sends to relays: one rank each, which hands it on to the ranks behind it. In hybrid mode the relay
// of a node is its rank of the same rail, with all ranks of the node behind it. In direct mode every rank of another
// node is a relay, with itself behind it. The ranks of this rank's own node are behind this rank, in either mode.
#pragma once

#include <deep_ep_ep/opening.cuh>

namespace deep_ep_ep {

// Words of 64 bits in every rank's window, one a rank of each kind. They only grow.
enum NetworkWord : int {
    kWordOpening = 0,   // by rank of the rail: openings that it has put here; a signal
    kWordOpened = 1,    // by rank: the last epoch of which its opening is here
    kWordRows = 2,      // by rank: chunks of rows that it has put here in dispatches; a signal
    kWordReturned = 3,  // by rank: puts of rows that it has sent back here in combines; a signal
    kWordArrived = 4,   // by rank: rows of its tokens that are in this rank's dispatch output
    kWordRead = 5,      // by place in the node: combines for which it has read this rank's rows
    kNumNetworkWords = 6,
};

struct Network {
    comm::LsaTeam team;  // the node of this rank
    comm::WaitParams wait;
    RankState* state;
    // Device memory: [kNumNetworkWords, num_ranks] what this rank has waited for so far, and [contexts] what it has put.
    unsigned long long *totals, *num_puts;
    // In all windows alike: the slots of openings and counts, bytes of a slot, and the words.
    unsigned long long slots_offset, slot_bytes, words_offset;
    int num_ranks;     // of the group
    int num_contexts;  // GIN contexts to use
    bool is_hybrid;
};

__device__ __forceinline__ int num_nodes(const Network& net) { return net.num_ranks / net.team.num_ranks; }

__device__ __forceinline__ int own_node(const Network& net) { return net.team.first_rank / net.team.num_ranks; }

__device__ __forceinline__ int own_rank(const Network& net) { return net.team.first_rank + net.team.rank; }

__device__ __forceinline__ bool is_in_node(const Network& net, int rank) {
    return net.team.first_rank <= rank && rank < net.team.first_rank + net.team.num_ranks;
}

// Relays are numbered by node in hybrid mode, else by rank. The number of a relay is also that by which it knows the
// ranks that it gets rows from.
__device__ __forceinline__ int num_relays(const Network& net) { return net.is_hybrid ? num_nodes(net) : net.num_ranks; }

__device__ __forceinline__ int own_relay(const Network& net) { return net.is_hybrid ? own_node(net) : own_rank(net); }

// The relay through which this rank reaches a rank.
__device__ __forceinline__ int relay_of(const Network& net, int rank) {
    if (net.is_hybrid) return rank / net.team.num_ranks;
    return is_in_node(net, rank) ? own_rank(net) : rank;
}

// The rank that a relay is.
__device__ __forceinline__ int relay_rank(const Network& net, int relay) {
    return net.is_hybrid ? relay * net.team.num_ranks + net.team.rank : relay;
}

// Whether this rank, as the relay of another one or of its own, hands that one's rows on to a rank.
__device__ __forceinline__ bool hands_on_to(const Network& net, int from_relay, int rank) {
    if (net.is_hybrid || from_relay == own_relay(net)) return is_in_node(net, rank);
    return rank == own_rank(net);
}

// A slot holds the opening of a rank and, behind it, its counts where the operation has some. Slots are taken in turn
// by the epoch's parity, see `opening.cuh` for why two are enough.
__device__ __forceinline__ unsigned long long slot_offset(const Network& net, int source, unsigned long long epoch) {
    return net.slots_offset + ((epoch % 2) * net.num_ranks + source) * net.slot_bytes;
}

// The opening of a rank, as it lies in this rank's window.
__device__ __forceinline__ const Opening& opening_of(const Network& net, int source, unsigned long long epoch) {
    return *comm::window_pointer<const Opening>(net.team, net.team.rank, slot_offset(net, source, epoch));
}

// The counts behind it.
__device__ __forceinline__ unsigned* counts_of(const Network& net, int source, unsigned long long epoch) {
    return comm::window_pointer<unsigned>(net.team, net.team.rank, slot_offset(net, source, epoch) + sizeof(Opening));
}

__device__ __forceinline__ unsigned long long word_offset(const Network& net, NetworkWord word, int idx) {
    return net.words_offset + (static_cast<unsigned long long>(word) * net.num_ranks + idx) * 8;
}

__device__ __forceinline__ unsigned long long* word_at(const Network& net, int lsa_rank, NetworkWord word, int idx) {
    return comm::window_pointer<unsigned long long>(net.team, lsa_rank, word_offset(net, word, idx));
}

__device__ __forceinline__ unsigned long long& total_of(const Network& net, NetworkWord word, int idx) {
    return net.totals[static_cast<long long>(word) * net.num_ranks + idx];
}

// Chunks are what is put at once: some consecutive rows of one relay. Blocks take them in turn.
struct Chunk {
    int relay;  // -1: there are no more
    int begin;  // first of its rows, counted from the first of the relay
    int end;
};

__device__ __forceinline__ int num_chunks(int num_rows, int chunk_rows) {
    return (num_rows + chunk_rows - 1) / chunk_rows;
}

// The chunk of an index. The relays of other nodes come first, each rank beginning with the one behind itself, and its
// own last, so that the network has something to do meanwhile.
__device__ __forceinline__ Chunk chunk_of(const Network& net, const int* num_rows, int chunk_rows, long long idx) {
    const int num = num_relays(net);
    for (int step = 1; step <= num; ++step) {
        const int relay = (own_relay(net) + step) % num;
        const int count = num_chunks(num_rows[relay], chunk_rows);
        if (idx < count) {
            const int begin = static_cast<int>(idx) * chunk_rows;
            return Chunk{relay, begin, min(begin + chunk_rows, num_rows[relay])};
        }
        idx -= count;
    }
    return Chunk{-1, 0, 0};
}

}  // namespace deep_ep_ep
