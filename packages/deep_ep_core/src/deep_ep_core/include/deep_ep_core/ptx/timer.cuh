// Clocks, and a thread's pause.
#pragma once

namespace deep_ep_core::ptx {

// Nanoseconds of a clock that all SMs share. It steps coarsely, by up to about a microsecond, and costs more than a few
// loads from cache: read it every so many polls. Only differences on one GPU mean something.
// %globaltimer. PTX ISA: "Special Registers: %globaltimer".
__device__ __forceinline__ unsigned long long globaltimer_ns() {
    unsigned long long time_ns;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time_ns)::"memory");
    return time_ns;
}

// Cycles of this SM's clock; not comparable between SMs.
// %clock64. PTX ISA: "Special Registers: %clock64".
__device__ __forceinline__ unsigned long long clock_cycles() {
    unsigned long long num_cycles;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(num_cycles)::"memory");
    return num_cycles;
}

// Suspends the thread for up to twice the time given, at most a millisecond.
// nanosleep. PTX ISA: "Miscellaneous Instructions: nanosleep".
__device__ __forceinline__ void sleep_ns(unsigned duration_ns) {
    asm volatile("nanosleep.u32 %0;" ::"r"(duration_ns) : "memory");
}

}  // namespace deep_ep_core::ptx
