// Packs this rank's tokens by relay and puts them: one record a (token, relay), chunk by chunk.
//
// A record is a row, its side record (`dispatch_params.cuh`), and the token's row at each receiver. Records for this
// rank's own node stay here, where the next kernel finds them, and have no row: that is read from x.
#pragma once

#include <deep_ep_ep/network/dispatch_params.cuh>
#include <deep_ep_ep/network/gin_relay.cuh>
#include <deep_ep_ep/side_records.cuh>

namespace deep_ep_ep {

struct NetworkDispatchCall {
    GinAccess gin;
    NetworkDispatchParams call;
};

// Copies a row. Called by all lanes of a warp; both places are multiples of 16 bytes, and so is the size.
__device__ __forceinline__ void copy_row(unsigned char* to, const unsigned char* from, int num_bytes) {
    constexpr int kBatch = 4;  // loads that wait together
    const int lane = static_cast<int>(threadIdx.x) % 32, num_vectors = num_bytes / 16;
    for (int first = lane; first < num_vectors; first += kBatch * 32) {
        uint4 vectors[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i * 32 < num_vectors) vectors[i] = reinterpret_cast<const uint4*>(from)[first + i * 32];
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
            if (first + i * 32 < num_vectors) reinterpret_cast<uint4*>(to)[first + i * 32] = vectors[i];
    }
}

// Writes what a record has beside the row. Called by all lanes of a warp.
template <class Index>
__device__ __forceinline__ void pack_side(const NetworkDispatchParams& p, unsigned* to, int token) {
    const DispatchParams& local = p.local;
    const int lane = static_cast<int>(threadIdx.x) % 32, num_words = local.side_bytes / 4;
    const SideLayout layout = side_layout(local);
    const long long first_entry = static_cast<long long>(token) * local.num_topk;
    for (int word = lane; word < num_words; word += 32) {
        unsigned value = 0;
        if (layout.ids <= word && word < layout.rows) {
            // Any negative id means none; not all of them stay negative in 32 bits.
            const Index id = static_cast<const Index*>(local.topk_idx)[first_entry + word - layout.ids];
            value = id < 0 ? ~0u : static_cast<unsigned>(id);
        } else if (word <= layout.token)
            value = side_word(local, layout, token, word);
        to[word] = value;
    }
    if (lane < local.num_topk) to[num_words + lane] = static_cast<unsigned>(local.row_of_entry[first_entry + lane]);
}

// The kernel's body, for blocks of `kMoveThreads`.
template <NetworkIndexConfig kConfig>
__device__ __forceinline__ void send_rows_to_relays(const NetworkDispatchCall& c) {
    using Index = typename IndexOf<kConfig.is_idx64>::Type;
    const NetworkDispatchParams& p = c.call;
    const Network& net = p.net;
    if (comm::has_expired(net.wait)) return;
    const int warp = static_cast<int>(threadIdx.x) / 32, row_bytes = p.local.row_bytes;
    const int* num_sent = relay_counts(p, kRelaySent);
    for (long long idx = blockIdx.x;; idx += gridDim.x) {
        const Chunk chunk = chunk_of(net, num_sent, p.chunk_rows, idx);
        if (chunk.relay < 0) break;
        const bool is_own = chunk.relay == own_relay(net);
        const int first = relay_counts(p, kRelaySentBegin)[chunk.relay];
        // Own tokens have no place in the slab.
        const int num_own = own_relay(net) < chunk.relay ? num_sent[own_relay(net)] : 0;
        const unsigned long long from_offset =
            p.send_offset + static_cast<unsigned long long>(first - num_own + chunk.begin) * p.record_bytes;
        for (int slot = chunk.begin + warp; slot < chunk.end; slot += kMoveThreads / 32) {
            const int token = p.sent_tokens[first + slot];
            unsigned char* record =
                is_own ? recv_record(p, chunk.relay, slot)
                       : comm::window_pointer<unsigned char>(
                             net.team, net.team.rank,
                             from_offset + static_cast<unsigned long long>(slot - chunk.begin) * p.record_bytes);
            if (!is_own)
                copy_row(record, static_cast<const unsigned char*>(p.local.x) + static_cast<long long>(token) * row_bytes,
                         row_bytes);
            pack_side<Index>(p, reinterpret_cast<unsigned*>(record + row_bytes), token);
        }
        if (is_own) continue;
        // The relay knows this rank by the number that it has as a relay itself.
        const long long place = static_cast<long long>(own_relay(net)) * p.local.num_max_tokens + chunk.begin;
        // Each thread's stores go with the put, which one of them issues behind a barrier of the block.
        ptx::fence_acq_rel<ptx::Scope::kSys>();
        put_to_relay(c.gin, net, idx, chunk.relay, p.recv_offset + place * p.record_bytes, from_offset,
                     static_cast<unsigned long long>(chunk.end - chunk.begin) * p.record_bytes, kWordRows,
                     ncclCoopCta());
    }
}

}  // namespace deep_ep_ep
