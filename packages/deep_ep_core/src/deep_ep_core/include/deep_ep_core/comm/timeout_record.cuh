// What a wait leaves behind when its deadline passes: one record in pinned host memory, for the first wait that
// expires.
//
// A kernel never traps, since that would take the CUDA context with it. It writes the record and leaves; the host finds
// it and names the late peer (`deep_ep_core.wait.TimeoutLog`). Both structs are mirrored there.
#pragma once

#include <deep_ep_core/ptx/atom.cuh>
#include <deep_ep_core/ptx/ld.cuh>
#include <deep_ep_core/ptx/st.cuh>

namespace deep_ep_core::comm {

inline constexpr unsigned kRecordEmpty = 0;
inline constexpr unsigned kRecordWhole = 1;

struct TimeoutRecord {
    unsigned state;  // kRecordEmpty, then kRecordWhole once all other members are written
    unsigned phase;  // number of the phase, from TimeoutLog.add_phases
    int rank;        // the rank that waited, in the group
    int peer;        // the rank that it waited for, in the group
    unsigned long long expected;
    unsigned long long seen;
    unsigned long long waited_ns;
};

// What every wait of a kernel needs: the part of a kernel's parameters that says how long to wait and where to report.
struct WaitParams {
    TimeoutRecord* record;          // pinned host memory
    unsigned* has_expired;          // device memory of this rank: 0, and 1 from the first wait that expired on
    unsigned long long timeout_ns;  // of each single wait
    unsigned first_phase;           // number of this kernel's first phase
    int rank;                       // this rank, in the group
};

// Whether a wait of this rank has expired, in this kernel or in one before. A thread that sees it stops waiting.
// Relaxed is enough: no data hangs on the answer, only the moment at which a thread that waits gives up.
__device__ __forceinline__ bool has_expired(const WaitParams& wait) {
    return ptx::ld_relaxed<ptx::Scope::kGpu>(wait.has_expired) != 0;
}

// Called by a thread whose deadline has passed. The first one of this rank writes the record, the others do nothing.
__device__ __forceinline__ void report_timeout(const WaitParams& wait, unsigned phase_idx, int peer,
                                               unsigned long long expected, unsigned long long seen,
                                               unsigned long long waited_ns) {
    constexpr ptx::Scope kSys = ptx::Scope::kSys;
    // The claim is a word of its own in device memory: host memory need not know atomics.
    if (ptx::atom_cas_relaxed<ptx::Scope::kGpu>(wait.has_expired, 0u, 1u) != 0) return;
    TimeoutRecord* record = wait.record;
    ptx::st_relaxed<kSys>(&record->phase, wait.first_phase + phase_idx);
    ptx::st_relaxed<kSys>(&record->rank, wait.rank);
    ptx::st_relaxed<kSys>(&record->peer, peer);
    ptx::st_relaxed<kSys>(&record->expected, expected);
    ptx::st_relaxed<kSys>(&record->seen, seen);
    ptx::st_relaxed<kSys>(&record->waited_ns, waited_ns);
    // The host polls the state without any CUDA call, while the kernel may still run: the release, at system scope,
    // keeps the members from becoming visible to it after the state.
    ptx::st_release<kSys>(&record->state, kRecordWhole);
}

}  // namespace deep_ep_core::comm
