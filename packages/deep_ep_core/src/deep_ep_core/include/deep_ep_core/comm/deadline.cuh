// The one loop in which device code waits for something that may never come.
//
// Times, of each single wait: the deadline is `timeout_ns` after the wait began. It is looked at every 32 polls, so
// that polling stays as fast as the load it polls with (about 1 us from a peer, less from local memory): a wait ends
// within about 0.1 ms of its deadline. The same glance shows whether another wait of this rank has expired, and then
// this one ends too. Up to 1,024 polls, so for about a millisecond, a thread polls as fast as it can; from then on it
// sleeps 0.5 us to 1 us between polls, which leaves the memory to others and adds at most that to a wait that was long
// already.
#pragma once

#include <deep_ep_core/comm/timeout_record.cuh>
#include <deep_ep_core/ptx/timer.cuh>

namespace deep_ep_core::comm {

inline constexpr unsigned kPollsPerGlance = 32;
inline constexpr unsigned kNumEagerPolls = 1024;
inline constexpr unsigned kPauseNs = 500;

// Polls until it is true, the deadline passes, or another wait of this rank has expired.
//
// Called by one thread, or by several that each wait for something of their own. Orders nothing itself: that is for the
// loads that `poll` makes.
//
// wait: where and when to give up.
// phase_idx: number of the phase in this kernel, for the report.
// peer: the rank that is waited for, in the group, for the report.
// expected: what is waited for, for the report.
// poll: `bool poll(unsigned long long& seen)` says whether it has come, and what is there for the report.
//
// Returns true if it has come. After false the thread must not touch what it waited for; it still takes part in the
// block's barriers, and the kernel goes on to its end.
template <class Poll>
[[nodiscard]] __device__ __forceinline__ bool wait_until(const WaitParams& wait, unsigned phase_idx, int peer,
                                                         unsigned long long expected, Poll poll) {
    unsigned long long seen = 0;
    if (poll(seen)) return true;
    const unsigned long long begin_ns = ptx::globaltimer_ns();
    for (unsigned num_polls = 1;; ++num_polls) {
        if (poll(seen)) return true;
        if (num_polls % kPollsPerGlance == 0) {
            if (has_expired(wait)) return false;
            const unsigned long long waited_ns = ptx::globaltimer_ns() - begin_ns;
            // Signed, because a clock that steps back must not look like centuries.
            if (static_cast<long long>(waited_ns) >= static_cast<long long>(wait.timeout_ns)) {
                // The thread may have been stopped since its last poll, to let another process run: what came in time
                // is not late.
                if (poll(seen)) return true;
                report_timeout(wait, phase_idx, peer, expected, seen, waited_ns);
                return false;
            }
        }
        if (num_polls > kNumEagerPolls) ptx::sleep_ns(kPauseNs);
    }
}

}  // namespace deep_ep_core::comm
