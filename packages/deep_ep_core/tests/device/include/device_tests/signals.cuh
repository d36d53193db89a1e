// Two blocks that talk by flags and by messages, and waits for what never comes.
#pragma once

#include <deep_ep_core/comm/flag.cuh>
#include <deep_ep_core/comm/mbarrier_wait.cuh>
#include <deep_ep_core/comm/message.cuh>
#include <deep_ep_core/ptx/fence.cuh>

namespace device_tests {

namespace comm = deep_ep_core::comm;
namespace ptx = deep_ep_core::ptx;

// A number that no two (round, position, sender) share by accident, so that a stale or misplaced value does not pass.
__device__ __forceinline__ unsigned long long mixed(unsigned long long round, unsigned position, unsigned sender) {
    unsigned long long bits = (round << 40) ^ (static_cast<unsigned long long>(position) << 16) ^ sender;
    bits = (bits ^ (bits >> 31)) * 0x9e3779b97f4a7c15ull;
    return bits ^ (bits >> 29);
}

struct PingPongConfig {
    ptx::Scope scope;
    bool is_counted;  // each warp raises the flag by one, instead of one thread setting it
};

struct PingPongParams {
    comm::WaitParams wait;
    unsigned long long* flags;     // [2], zero before; one for each block that waits
    unsigned long long* payloads;  // [2, num_words]; one for each block that writes
    unsigned long long first_round;
    int num_rounds;
    int num_words;
    unsigned* num_wrong;
    unsigned* num_late;
};

// For a grid of two blocks, of whole warps. In each round block 0 writes and block 1 reads, then the other way round.
template <PingPongConfig kConfig>
class PingPong {
   public:
    __device__ __forceinline__ explicit PingPong(const PingPongParams& p) : p_(p) {}

    __device__ __forceinline__ void write(unsigned long long round) const {
        const unsigned me = blockIdx.x;
        for (int idx = static_cast<int>(threadIdx.x); idx < p_.num_words; idx += static_cast<int>(blockDim.x))
            p_.payloads[me * p_.num_words + idx] = mixed(round, static_cast<unsigned>(idx), me);
        unsigned long long* flag = &p_.flags[1 - me];
        if constexpr (kConfig.is_counted) {
            // The lanes' writes come before the release of lane 0.
            __syncwarp();
            if (threadIdx.x % 32 == 0) comm::raise_flag<kScope>(flag, 1);
        } else {
            __syncthreads();
            if (threadIdx.x == 0) comm::publish_flag<kScope>(flag, round);
        }
    }

    __device__ __forceinline__ bool read(unsigned long long round) const {
        const unsigned me = blockIdx.x, sender = 1 - me;
        const unsigned long long wanted = kConfig.is_counted ? round * (blockDim.x / 32) : round;
        bool has_come = true;
        if (threadIdx.x == 0)
            has_come = comm::wait_flag<kScope>(&p_.flags[me], wanted, p_.wait, me, static_cast<int>(sender));
        if (__syncthreads_and(has_come) == 0) {
            if (threadIdx.x == 0) ptx::red_add_relaxed<ptx::Scope::kGpu>(p_.num_late, 1u);
            return false;
        }
        for (int idx = static_cast<int>(threadIdx.x); idx < p_.num_words; idx += static_cast<int>(blockDim.x)) {
            if (p_.payloads[sender * p_.num_words + idx] != mixed(round, static_cast<unsigned>(idx), sender))
                ptx::red_add_relaxed<ptx::Scope::kGpu>(p_.num_wrong, 1u);
        }
        // All have read before any thread of this block answers, which lets the other block write again.
        __syncthreads();
        return true;
    }

   private:
    static constexpr ptx::Scope kScope = kConfig.scope;
    const PingPongParams& p_;
};

template <PingPongConfig kConfig>
__device__ __forceinline__ void ping_pong(const PingPongParams& p) {
    const PingPong<kConfig> game(p);
    for (unsigned long long round = p.first_round; round < p.first_round + p.num_rounds; ++round) {
        if (blockIdx.x == 0) {
            game.write(round);
            if (!game.read(round)) return;
        } else {
            if (!game.read(round)) return;
            game.write(round);
        }
    }
}

struct TalkParams {
    comm::WaitParams wait;
    comm::Message* slots;        // [2 blocks that read, 2 epochs in turn, num_threads], zero before
    unsigned long long* epochs;  // [2], zero before: the epoch that each block has finished
    int num_epochs;
    unsigned* num_wrong;
    unsigned* num_late;
};

// For a grid of two blocks: each thread sends to the same thread of the other block, num_epochs times.
__device__ __forceinline__ void talk(const TalkParams& p) {
    const unsigned me = blockIdx.x, other = 1 - me, thread_idx = threadIdx.x;
    const auto slot_of = [&p, thread_idx](unsigned reader, unsigned long long epoch) {
        return &p.slots[(reader * 2 + static_cast<unsigned>(epoch % 2)) * blockDim.x + thread_idx];
    };
    const unsigned long long last_epoch = p.epochs[me] + p.num_epochs;
    for (unsigned long long epoch = p.epochs[me] + 1; epoch <= last_epoch; ++epoch) {
        comm::send_message(slot_of(other, epoch), mixed(epoch, thread_idx, me), epoch);
        const comm::ReceivedMessage received =
            comm::wait_message(slot_of(me, epoch), epoch, p.wait, me, static_cast<int>(other));
        if (!received.has_come) {
            ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_late, 1u);
            break;
        }
        if (received.payload != mixed(epoch, thread_idx, other))
            ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_wrong, 1u);
    }
    // All have read the epoch that they began with.
    __syncthreads();
    if (thread_idx == 0) p.epochs[me] = last_epoch;
}

struct VouchParams {
    comm::WaitParams wait;
    comm::Message* slots;         // [2 blocks, 2 epochs in turn], zero before
    unsigned long long* words;    // [2 blocks, num_words]
    unsigned long long* epochs;   // [2], zero before
    int num_epochs;
    int num_words;
    unsigned* num_wrong;
    unsigned* num_late;
};

// For a grid of two blocks: a message also stands for plain writes, by a fence on each side.
__device__ __forceinline__ void vouch(const VouchParams& p) {
    const unsigned me = blockIdx.x, other = 1 - me;
    const unsigned long long last_epoch = p.epochs[me] + p.num_epochs;
    for (unsigned long long epoch = p.epochs[me] + 1; epoch <= last_epoch; ++epoch) {
        // Words of odd and even epochs are apart, so that a block may write while the other still reads the last ones.
        const int half = p.num_words / 2, begin = static_cast<int>(epoch % 2) * half;
        for (int idx = static_cast<int>(threadIdx.x); idx < half; idx += static_cast<int>(blockDim.x))
            p.words[me * p.num_words + begin + idx] = mixed(epoch, static_cast<unsigned>(idx), me);
        __syncthreads();
        bool has_come = true;
        if (threadIdx.x == 0) {
            ptx::fence_acq_rel<ptx::Scope::kSys>();
            comm::send_message(&p.slots[other * 2 + epoch % 2], epoch, epoch);
            const comm::Message* slot = &p.slots[me * 2 + epoch % 2];
            has_come = comm::wait_message(slot, epoch, p.wait, me, static_cast<int>(other)).has_come;
            ptx::fence_acq_rel<ptx::Scope::kSys>();
        }
        if (__syncthreads_and(has_come) == 0) {
            if (threadIdx.x == 0) ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_late, 1u);
            break;
        }
        for (int idx = static_cast<int>(threadIdx.x); idx < half; idx += static_cast<int>(blockDim.x)) {
            if (p.words[other * p.num_words + begin + idx] != mixed(epoch, static_cast<unsigned>(idx), other))
                ptx::red_add_relaxed<ptx::Scope::kGpu>(p.num_wrong, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) p.epochs[me] = last_epoch;
}

enum class WaitKind : int { kFlag = 0, kMessage = 1, kMbarrier = 2 };

struct ExpireConfig {
    WaitKind kind;
};

struct ExpireParams {
    comm::WaitParams wait;
    unsigned long long* flags;  // [num_threads]; thread idx waits for flags[idx] to be idx + 1000, from rank idx + 100
    comm::Message* slots;       // [num_threads]; thread idx waits for epoch idx + 1000, from rank idx + 100
    unsigned* num_arrived;
    unsigned* num_late;
};

// Every thread waits for something; whether that comes is up to what the host put there.
template <ExpireConfig kConfig>
__device__ __forceinline__ void expire(const ExpireParams& p) {
    __shared__ unsigned long long barrier;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&barrier, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    const unsigned idx = blockIdx.x * blockDim.x + threadIdx.x;
    const int peer = static_cast<int>(idx) + 100;
    bool has_come;
    if constexpr (kConfig.kind == WaitKind::kFlag)
        has_come = comm::wait_flag(&p.flags[idx], idx + 1000, p.wait, 1, peer);
    else if constexpr (kConfig.kind == WaitKind::kMessage)
        has_come = comm::wait_message(&p.slots[idx], idx + 1000, p.wait, 1, peer).has_come;
    else
        has_come = comm::wait_mbarrier(&barrier, 0, p.wait, 1, peer);
    ptx::red_add_relaxed<ptx::Scope::kGpu>(has_come ? p.num_arrived : p.num_late, 1u);
}

}  // namespace device_tests
