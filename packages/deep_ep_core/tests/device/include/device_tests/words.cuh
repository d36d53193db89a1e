// Scalar and vector accesses, atomics, warps, clocks and dependent launches, so that torch can tell if one is wrong.
#pragma once

#include <deep_ep_core/ptx/atom.cuh>
#include <deep_ep_core/ptx/grid_dependency.cuh>
#include <deep_ep_core/ptx/ld.cuh>
#include <deep_ep_core/ptx/named_barrier.cuh>
#include <deep_ep_core/ptx/red.cuh>
#include <deep_ep_core/ptx/st.cuh>
#include <deep_ep_core/ptx/timer.cuh>
#include <deep_ep_core/ptx/warp.cuh>
#include <deep_ep_core/version.cuh>

namespace device_tests {

namespace ptx = deep_ep_core::ptx;
using Scope = ptx::Scope;

static_assert(deep_ep_core::headers_fit(deep_ep_core::kMajorVersion, deep_ep_core::kMinorVersion));
static_assert(!deep_ep_core::headers_fit(deep_ep_core::kMajorVersion + 1, 0));

__device__ __forceinline__ int global_thread_idx() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// y32 and y64 are [4, num_words], y128 is [2, num_words] of 16 bytes: x through each pair of a load and a store.
struct CopyWordsParams {
    const unsigned* x32;
    unsigned* y32;
    const unsigned long long* x64;
    unsigned long long* y64;
    const void* x128;
    void* y128;
    int num_words;
};

template <class T, class Signed>
__device__ __forceinline__ void copy_word(const T* x, T* y, int num_words, int idx) {
    ptx::st_relaxed<Scope::kGpu>(&y[idx], ptx::ld_relaxed<Scope::kGpu>(&x[idx]));
    ptx::st_relaxed<Scope::kSys>(&y[num_words + idx], ptx::ld_relaxed<Scope::kSys>(&x[idx]));
    const Signed* signed_x = reinterpret_cast<const Signed*>(x);
    Signed* signed_y = reinterpret_cast<Signed*>(y);
    ptx::st_release<Scope::kGpu>(&signed_y[2 * num_words + idx], ptx::ld_acquire<Scope::kGpu>(&signed_x[idx]));
    ptx::st_release<Scope::kSys>(&signed_y[3 * num_words + idx], ptx::ld_acquire<Scope::kSys>(&signed_x[idx]));
}

__device__ __forceinline__ void copy_words(const CopyWordsParams& p) {
    const int idx = global_thread_idx();
    if (idx >= p.num_words) return;
    copy_word<unsigned, int>(p.x32, p.y32, p.num_words, idx);
    copy_word<unsigned long long, long long>(p.x64, p.y64, p.num_words, idx);
    const ulonglong2* pairs = static_cast<const ulonglong2*>(p.x128);
    ptx::st_relaxed_sys_v2(static_cast<ulonglong2*>(p.y128) + idx, ptx::ld_relaxed_sys_v2(&pairs[idx]));
    const uint4* quads = static_cast<const uint4*>(p.x128);
    ptx::st_relaxed_sys_v4(static_cast<uint4*>(p.y128) + p.num_words + idx, ptx::ld_relaxed_sys_v4(&quads[idx]));
}

// All words are zero before. With n threads in all: sums of idx + 1; tickets [4, n], each row a permutation of 0 to
// n - 1; claims [n / 32] of 1 + a winner's index, with as many winners.
struct CountParams {
    unsigned* sums32;               // [4]
    unsigned long long* sums64;     // [4], of (idx + 1) << 24
    unsigned* counters32;           // [4]
    unsigned long long* counters64;  // [4]
    unsigned* tickets32;            // [4, n]
    unsigned long long* tickets64;  // [4, n]
    unsigned* claims32;             // [2, n / 32]
    unsigned long long* claims64;   // [2, n / 32]
    unsigned* num_winners;          // [4]
    unsigned* values;               // [n]
    unsigned* num_blocks_done;      // [1]
    unsigned long long* total;      // [1], of idx * idx, by the block that was the last to come
};

template <class T>
__device__ __forceinline__ void add_everywhere(T* sums, T amount, T* counters, T* tickets, int num_threads, int idx) {
    ptx::red_add_relaxed<Scope::kGpu>(&sums[0], amount);
    ptx::red_add_relaxed<Scope::kSys>(&sums[1], amount);
    ptx::red_add_release<Scope::kGpu>(&sums[2], amount);
    ptx::red_add_release<Scope::kSys>(&sums[3], amount);
    const T one = 1;
    tickets[idx] = ptx::atom_add_relaxed<Scope::kGpu>(&counters[0], one);
    tickets[num_threads + idx] = ptx::atom_add_relaxed<Scope::kSys>(&counters[1], one);
    tickets[2 * num_threads + idx] = ptx::atom_add_acq_rel<Scope::kGpu>(&counters[2], one);
    tickets[3 * num_threads + idx] = ptx::atom_add_acq_rel<Scope::kSys>(&counters[3], one);
}

template <class T>
__device__ __forceinline__ void claim_everywhere(T* claims, int num_claims, int idx, unsigned* num_winners) {
    const T nobody = 0, me = static_cast<T>(idx + 1);
    if (ptx::atom_cas_relaxed<Scope::kGpu>(&claims[idx % num_claims], nobody, me) == nobody)
        ptx::red_add_relaxed<Scope::kGpu>(&num_winners[0], 1u);
    if (ptx::atom_cas_relaxed<Scope::kSys>(&claims[num_claims + idx % num_claims], nobody, me) == nobody)
        ptx::red_add_relaxed<Scope::kGpu>(&num_winners[1], 1u);
}

// The last block to come reads plainly what all the others wrote plainly.
__device__ __forceinline__ void sum_in_last_block(const CountParams& p, int num_threads, int idx) {
    __shared__ unsigned num_blocks_before;
    p.values[idx] = static_cast<unsigned>(idx);
    __syncthreads();
    if (threadIdx.x == 0) num_blocks_before = ptx::atom_add_acq_rel<Scope::kGpu>(p.num_blocks_done, 1u);
    __syncthreads();
    if (num_blocks_before != gridDim.x - 1) return;
    for (int other = static_cast<int>(threadIdx.x); other < num_threads; other += static_cast<int>(blockDim.x)) {
        const unsigned long long value = p.values[other];
        ptx::red_add_relaxed<Scope::kGpu>(p.total, value * value);
    }
}

__device__ __forceinline__ void count(const CountParams& p) {
    const int idx = global_thread_idx(), num_threads = static_cast<int>(gridDim.x * blockDim.x);
    const unsigned amount = static_cast<unsigned>(idx + 1);
    add_everywhere(p.sums32, amount, p.counters32, p.tickets32, num_threads, idx);
    const unsigned long long wide_amount = static_cast<unsigned long long>(amount) << 24;
    add_everywhere(p.sums64, wide_amount, p.counters64, p.tickets64, num_threads, idx);
    claim_everywhere(p.claims32, num_threads / 32, idx, &p.num_winners[0]);
    claim_everywhere(p.claims64, num_threads / 32, idx, &p.num_winners[2]);
    sum_in_last_block(p, num_threads, idx);
}

// For each thread: its lane, whether it was elected, and what two clocks say of a wait of at least `delay_ns`.
struct InspectParams {
    unsigned* lanes;
    unsigned* is_elected;
    unsigned long long* elapsed_ns;
    unsigned long long* elapsed_cycles;
    unsigned long long delay_ns;
};

__device__ __forceinline__ void inspect(const InspectParams& p) {
    const int idx = global_thread_idx();
    p.lanes[idx] = ptx::lane_idx();
    p.is_elected[idx] = ptx::elect_one() ? 1u : 0u;
    const unsigned long long begin_ns = ptx::globaltimer_ns(), begin_cycles = ptx::clock_cycles();
    while (ptx::globaltimer_ns() - begin_ns < p.delay_ns) ptx::sleep_ns(200);
    p.elapsed_cycles[idx] = ptx::clock_cycles() - begin_cycles;
    p.elapsed_ns[idx] = ptx::globaltimer_ns() - begin_ns;
}

// values += 1, late: right after any number of dependent launches only if each waits for the one before it.
struct ChainParams {
    unsigned* values;
    unsigned long long delay_ns;
};

__device__ __forceinline__ void chain(const ChainParams& p) {
    // At once, so that the next kernel is there long before this one has written.
    ptx::launch_dependents();
    ptx::wait_for_dependencies();
    const int idx = global_thread_idx();
    const unsigned value = p.values[idx];
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    while (ptx::globaltimer_ns() - begin_ns < p.delay_ns) ptx::sleep_ns(200);
    p.values[idx] = value + 1;
}

// In each round every warp reads what the other one of its pair has written, and only the pair has met in between.
struct MeetPairsParams {
    unsigned* num_wrong;  // [threads]
    int num_rounds;
};

// For blocks of whole pairs of warps, at most 15.
__device__ __forceinline__ void meet_pairs(const MeetPairsParams& p) {
    __shared__ unsigned words[1024];
    const unsigned thread_idx = threadIdx.x, partner_idx = thread_idx ^ 32;
    const int pair = static_cast<int>(thread_idx) / 64;
    unsigned num_wrong = 0;
    for (int round = 0; round < p.num_rounds; ++round) {
        const unsigned base = static_cast<unsigned>(round) * 1024;
        words[thread_idx] = base + thread_idx;
        ptx::named_barrier_sync(1 + pair, 64);
        num_wrong += words[partner_idx] != base + partner_idx;
        ptx::named_barrier_sync(1 + pair, 64);
    }
    p.num_wrong[global_thread_idx()] = num_wrong;
}

}  // namespace device_tests
