// Waits for peers, who may be masked: a masked rank is not waited for, and where there is a mask a rank that is late
// becomes a masked one instead of a report.
#pragma once

#include <deep_ep_legacy/low_latency/state.cuh>

namespace deep_ep_legacy::low_latency {

// Who takes part, as one block sees it when it begins to send or to receive; in shared memory.
struct Members {
    bool is_active[comm::kMaxLsaRanks];
    unsigned long long waited_ns[comm::kMaxLsaRanks];
};

__device__ __forceinline__ bool is_masked(const int* mask, int rank) {
    return mask != nullptr && ptx::ld_relaxed<ptx::Scope::kGpu>(mask + rank) != 0;
}

// Called by all threads of a block; followed by a barrier of it, before others look.
__device__ __forceinline__ void find_members(const CallParams& call, Members& members) {
    for (int rank = static_cast<int>(threadIdx.x); rank < call.team.num_ranks; rank += kNumThreads) {
        members.is_active[rank] = !is_masked(call.mask, rank);
        members.waited_ns[rank] = 0;
    }
}

// `comm::wait_until` for what a rank must do. Called by one thread. False if the rank is masked, or becomes so because
// it is late; without a mask, if it did not come in time.
template <class Poll>
[[nodiscard]] __device__ __forceinline__ bool wait_for_rank(const CallParams& call, unsigned phase_idx, int rank,
                                                            unsigned long long expected, Poll poll) {
    if (call.mask == nullptr) return comm::wait_until(call.wait, phase_idx, rank, expected, poll);
    if (is_masked(call.mask, rank)) return false;
    comm::WaitParams wait = call.wait;
    // This wait ends by the mask. It must not report.
    wait.timeout_ns = ~0ull >> 1;
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    bool has_come = false;
    unsigned num_polls = 0;
    const bool has_ended = comm::wait_until(wait, phase_idx, rank, expected, [&](unsigned long long& seen) {
        has_come = poll(seen);
        if (has_come || num_polls++ % comm::kPollsPerGlance != 0) return has_come;
        if (is_masked(call.mask, rank)) return true;
        if (ptx::globaltimer_ns() - begin_ns < call.wait.timeout_ns) return false;
        has_come = poll(seen);
        if (!has_come) ptx::st_relaxed<ptx::Scope::kGpu>(call.mask + rank, 1);
        return true;
    });
    return has_ended && has_come;
}

// Waits until each member has received the last operation of this half that it was told of, so that its slab may be
// written again. Called by all threads of each block; ends with a barrier. A rank that did not is no member any more.
__device__ __forceinline__ void wait_for_free_slabs(const CallParams& call, unsigned long long epoch,
                                                    Members& members) {
    const unsigned long long* received = signals_of(call, call.team.rank)->received[epoch % 2];
    for (int rank = static_cast<int>(threadIdx.x); rank < call.team.num_ranks; rank += kNumThreads) {
        const unsigned long long told = call.state->told[epoch % 2][rank];
        if (told == 0 || !members.is_active[rank]) continue;
        members.is_active[rank] = wait_for_rank(call, kPhaseFree, rank, told, [=](unsigned long long& seen) {
            seen = ptx::ld_acquire<ptx::Scope::kSys>(received + rank);
            return seen >= told;
        });
    }
    __syncthreads();
}

// Whether a rank is to be told that this rank's rows are there. Not after a wait that expired: what was sent may then
// be anything, and the peer's own wait names this rank.
__device__ __forceinline__ bool may_tell(const CallParams& call, const Members& members, int rank) {
    return members.is_active[rank] && !is_masked(call.mask, rank) && !comm::has_expired(call.wait);
}

// Ends the sending half: keeps the number of the operation, and who was told of it. Called by all threads of the last
// block, behind the words that tell.
__device__ __forceinline__ void count_sent(const CallParams& call, const Members& members, unsigned long long epoch) {
    for (int rank = static_cast<int>(threadIdx.x); rank < call.team.num_ranks; rank += kNumThreads)
        if (may_tell(call, members, rank)) call.state->told[epoch % 2][rank] = epoch;
    if (threadIdx.x != 0) return;
    call.state->num_sent = epoch;
    *call.epoch = epoch;
}

// Waits for a word of this operation from a rank. Called by one thread of each block, the same words in each.
//
// Where ranks may be masked, blocks must not differ in who came in time: the first block decides, and the others take
// what it took, from `decided[word_idx]`.
//
// Returns the word's count; -1 if it did not come, or tells of other sizes or flags, which is reported.
[[nodiscard]] __device__ __forceinline__ int wait_for_word(const CallParams& call, unsigned phase_idx, int rank,
                                                           const unsigned long long* word, int word_idx,
                                                           unsigned long long epoch) {
    constexpr unsigned long long kNobody = 0xffff0000ull;
    const unsigned long long stamp = epoch & 0xffffffffull;
    unsigned long long found = 0;
    bool has_come;
    if (call.mask != nullptr && blockIdx.x != 0) {
        const unsigned long long* decided = call.state->decided + word_idx;
        // The first block may have to give up several ranks, one after the other.
        comm::WaitParams wait = call.wait;
        wait.timeout_ns = min(wait.timeout_ns, ~0ull >> 5) * 16;
        has_come = comm::wait_until(wait, kPhaseDecide, call.wait.rank, stamp, [&](unsigned long long& seen) {
            found = ptx::ld_acquire<ptx::Scope::kGpu>(decided);
            seen = found >> 32;
            return seen == stamp;
        });
        return has_come && (found & kNobody) == 0 ? static_cast<int>(found & 0xffffull) : -1;
    }
    has_come = wait_for_rank(call, phase_idx, rank, stamp, [&](unsigned long long& seen) {
        found = ptx::ld_acquire<ptx::Scope::kSys>(word);
        seen = found >> 32;
        return seen == stamp;
    });
    if (has_come && (found >> 16 & 0xffffull) != call.digest) {
        comm::report_timeout(call.notes, kNoteDisagree, rank, call.digest, found >> 16 & 0xffffull, 0);
        has_come = false;
    }
    const unsigned long long count = found & 0xffffull;
    if (call.mask != nullptr)
        ptx::st_release<ptx::Scope::kGpu>(call.state->decided + word_idx,
                                          stamp << 32 | (has_come ? count : kNobody));
    return has_come ? static_cast<int>(count) : -1;
}

// Tells all members that this rank has received an operation. Called by all threads of the last block.
__device__ __forceinline__ void tell_received(const CallParams& call, unsigned long long epoch) {
    for (int rank = static_cast<int>(threadIdx.x); rank < call.team.num_ranks; rank += kNumThreads)
        if (!is_masked(call.mask, rank))
            ptx::st_release<ptx::Scope::kSys>(&signals_of(call, rank)->received[epoch % 2][call.team.rank], epoch);
}

// Adds what was waited for each rank to the caller's statistics. Called by all threads of the first block, behind a
// barrier that follows the waits.
__device__ __forceinline__ void add_wait_stats(const CallParams& call, const Members& members) {
    if (call.wait_stats == nullptr) return;
    for (int rank = static_cast<int>(threadIdx.x); rank < call.team.num_ranks; rank += kNumThreads)
        if (rank != call.team.rank) call.wait_stats[rank] += static_cast<long long>(members.waited_ns[rank]);
}

}  // namespace deep_ep_legacy::low_latency
