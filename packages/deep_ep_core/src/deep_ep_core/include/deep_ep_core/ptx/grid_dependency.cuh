// Programmatic dependent launch: a kernel that starts before the one in front of it in the stream has ended.
//
// Both do nothing in a kernel that was launched without the attribute (`LaunchShape.programmatic`).
#pragma once

namespace deep_ep_core::ptx {

// Waits until all kernels that this one depends on have ended and their writes are visible. Every thread that touches
// anything of theirs runs it first, whatever they signalled by `launch_dependents`.
// griddepcontrol.wait. PTX ISA: "Parallel Synchronization and Communication Instructions: griddepcontrol".
__device__ __forceinline__ void wait_for_dependencies() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// Lets kernels that depend on this one start, once all its blocks have run it or ended. It makes no write visible: that
// is what their wait is for.
// griddepcontrol.launch_dependents. PTX ISA: as above.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

}  // namespace deep_ep_core::ptx
