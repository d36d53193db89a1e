// Rounds of writes between all ranks of a team, one barrier a round, every word checked; and barriers that are timed.
#pragma once

#include <deep_ep_core/comm/lsa_barrier.cuh>
#include <deep_ep_core/comm/mbarrier_wait.cuh>
#include <deep_ep_core/ptx/bulk_copy.cuh>
#include <deep_ep_core/ptx/fence.cuh>
#include <device_tests/signals.cuh>

namespace device_tests {

enum class Transfer : int {
    kStore = 0,      // plain stores into the peers' windows, plain loads from the own one
    kBulkStore = 1,  // bulk stores into the peers' windows, plain loads from the own one
    kBulkLoad = 2,   // plain stores into the own window, bulk loads from the peers'
};

struct ExchangeConfig {
    Transfer transfer;
};

struct ExchangeParams {
    comm::LsaTeam team;
    comm::WaitParams wait;
    unsigned long long slots_offset;  // of the barrier slots in the windows, [num_blocks]
    unsigned long long words_offset;  // of the data there, [2 rounds in turn, num_blocks, num_ranks, num_words]
    unsigned long long first_round;
    int num_rounds;
    int num_words;  // an even number
    unsigned* num_wrong;
    unsigned* num_late;
};

// The last argument tells what is meant for one peer from what is meant for another.
__device__ __forceinline__ unsigned long long exchanged(unsigned long long round, int word_idx, int from, int to) {
    const unsigned sender = static_cast<unsigned>(from * deep_ep_core::comm::kMaxLsaRanks + to);
    return mixed(round, static_cast<unsigned>(word_idx) * 64 + blockIdx.x, sender);
}

// For a block of any size, block b of all ranks together. Dynamic shared memory: num_words * 8 bytes, for bulk copies.
//
// Data of odd and even rounds are apart. So one barrier a round is enough: who writes in round r + 2 has passed the
// barrier of round r + 1, to which all ranks came after they had read what was written in round r.
template <ExchangeConfig kConfig>
class Exchange {
   public:
    __device__ __forceinline__ Exchange(const ExchangeParams& p, unsigned long long* staged,
                                        unsigned long long* barrier)
        : p_(p), staged_(staged), barrier_(barrier) {}

    // Before the barrier.
    __device__ __forceinline__ void write(unsigned long long round) const {
        const int me = p_.team.rank;
        if constexpr (kConfig.transfer == Transfer::kBulkLoad) {
            fill(words_of(me, round, me), round, me, me);
        } else {
            for (int peer = 0; peer < p_.team.num_ranks; ++peer) {
                if constexpr (kConfig.transfer == Transfer::kStore)
                    fill(words_of(peer, round, me), round, me, peer);
                else
                    push(round, peer);
            }
        }
        if constexpr (kConfig.transfer == Transfer::kBulkStore) {
            // Written, not just read: the barrier's release covers only what is complete.
            if (threadIdx.x == 0) ptx::bulk_wait<0>();
        }
    }

    // After the barrier. `parity` is that of the next phase of the mbarrier, one for each bulk load.
    __device__ __forceinline__ bool check(unsigned long long round, unsigned& parity) const {
        const int me = p_.team.rank;
        for (int peer = 0; peer < p_.team.num_ranks; ++peer) {
            if constexpr (kConfig.transfer == Transfer::kBulkLoad) {
                if (threadIdx.x == 0) {
                    // The peer wrote these bytes by plain stores, and the barrier told so.
                    ptx::fence_proxy_async();
                    ptx::mbarrier_arrive_expect_tx(barrier_, num_bytes());
                    ptx::bulk_load(staged_, words_of(peer, round, peer), num_bytes(), barrier_);
                }
                const bool has_come =
                    comm::wait_mbarrier(barrier_, parity, p_.wait, 1, comm::group_rank(p_.team, peer));
                if (__syncthreads_and(has_come) == 0) return false;
                parity ^= 1;
                compare(staged_, round, peer, peer);
                // The next load overwrites through the async proxy what was just read plainly.
                ptx::fence_proxy_async_shared();
                __syncthreads();
            } else {
                compare(words_of(me, round, peer), round, peer, me);
            }
        }
        return true;
    }

   private:
    __device__ __forceinline__ void push(unsigned long long round, int peer) const {
        fill(staged_, round, p_.team.rank, peer);
        // The store reads shared memory through the async proxy: each thread that wrote to it fences.
        ptx::fence_proxy_async_shared();
        __syncthreads();
        if (threadIdx.x == 0) {
            // The peer read these bytes by plain loads two rounds ago, and the barrier told so.
            ptx::fence_proxy_async_global();
            ptx::bulk_store(words_of(peer, round, p_.team.rank), staged_, num_bytes());
            ptx::bulk_commit();
            ptx::bulk_wait_read<0>();
        }
        // The staged words may be overwritten.
        __syncthreads();
    }

    __device__ __forceinline__ unsigned num_bytes() const { return static_cast<unsigned>(p_.num_words) * 8; }

    // Where rank `from` puts its words of a round, in the window of a rank.
    __device__ __forceinline__ unsigned long long* words_of(int owner, unsigned long long round, int from) const {
        const unsigned long long row = ((round % 2) * gridDim.x + blockIdx.x) * p_.team.num_ranks + from;
        return comm::window_pointer<unsigned long long>(p_.team, owner, p_.words_offset + row * num_bytes());
    }

    __device__ __forceinline__ void fill(unsigned long long* words, unsigned long long round, int from, int to) const {
        for (int pair = static_cast<int>(threadIdx.x); pair < p_.num_words / 2; pair += static_cast<int>(blockDim.x))
            reinterpret_cast<ulonglong2*>(words)[pair] =
                ulonglong2{exchanged(round, 2 * pair, from, to), exchanged(round, 2 * pair + 1, from, to)};
    }

    __device__ __forceinline__ void compare(const unsigned long long* words, unsigned long long round, int from,
                                            int to) const {
        for (int idx = static_cast<int>(threadIdx.x); idx < p_.num_words; idx += static_cast<int>(blockDim.x))
            if (words[idx] != exchanged(round, idx, from, to))
                ptx::red_add_relaxed<ptx::Scope::kGpu>(p_.num_wrong, 1u);
    }

    const ExchangeParams& p_;
    unsigned long long* staged_;
    unsigned long long* barrier_;
};

template <ExchangeConfig kConfig>
__device__ __forceinline__ void exchange(const ExchangeParams& p) {
    extern __shared__ __align__(128) unsigned long long staged[];
    __shared__ unsigned long long barrier;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&barrier, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const Exchange<kConfig> work(p, staged, &barrier);
    const unsigned long long slot_offset = p.slots_offset + blockIdx.x * sizeof(comm::LsaBarrierSlot);
    unsigned parity = 0;
    for (unsigned long long round = p.first_round; round < p.first_round + p.num_rounds; ++round) {
        work.write(round);
        if (!comm::lsa_barrier(p.team, slot_offset, p.wait, 0) || !work.check(round, parity)) {
            if (threadIdx.x == 0) ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_late, 1u);
            break;
        }
    }
}

struct TimeBarrierParams {
    comm::LsaTeam team;
    comm::WaitParams wait;
    unsigned long long slot_offset;
    int num_rounds;
    unsigned long long* elapsed_ns;  // [1], of all rounds but the first
};

// For one block: barriers, one behind the other.
__device__ __forceinline__ void time_barrier(const TimeBarrierParams& p) {
    // The first round waits for the peers' kernels to start.
    bool has_come = comm::lsa_barrier(p.team, p.slot_offset, p.wait, 0);
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    for (int round = 1; has_come && round < p.num_rounds; ++round)
        has_come = comm::lsa_barrier(p.team, p.slot_offset, p.wait, 0);
    if (threadIdx.x == 0) *p.elapsed_ns = ptx::globaltimer_ns() - begin_ns;
}

}  // namespace device_tests
