// Owns the interface of the layer that moves bytes and adds to words. Two layers implement it: `memory_host.c` for
// ordinary memory of processes, and `memory_cuda.c` for memory of GPUs. The network above knows neither.
#ifndef DEEP_EP_CORE_LOOPBACK_MEMORY_H
#define DEEP_EP_CORE_LOOPBACK_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "control.h"

// NCCL's kinds of pointers.
typedef enum { kMemoryHost = 1, kMemoryCuda = 2 } MemoryKind;

typedef enum { kCopyStarted = 0, kCopyFailed = 1, kCopyPeerGone = 2 } CopyStart;

// Where memory of some rank is, as this process reaches it. `kind` is 0 where it cannot.
typedef struct {
  int kind;
  int pid;  // whose address it is: 0 for this process
  uint64_t address;
  uint64_t mapping;  // what `detach` gives back; 0 for nothing
  uint64_t mapping_bytes;
} Place;

// A word of this process's memory, and what to add to it.
typedef struct {
  uint64_t address;
  uint64_t value;
} WordAdd;

enum { kMaxWordAdds = 16 };

typedef struct MemoryLayer MemoryLayer;
struct MemoryLayer {
  // For any thread.

  // Says how peers reach memory of this process; `share->kind` becomes 0 where they can't, which is no error.
  void (*share)(MemoryLayer* layer, void* address, size_t bytes, MemoryShare* share);
  // Gives back what `share` took, once all peers attached.
  void (*unshare)(MemoryLayer* layer, MemoryShare* share);
  bool (*attach)(MemoryLayer* layer, const MemoryShare* share, int pid, int pidfd, Place* place);
  void (*detach)(MemoryLayer* layer, Place* place);
  // Memory of this process to keep messages in while they are under way; false if there is none.
  bool (*allocate)(MemoryLayer* layer, size_t bytes, Place* place);
  void (*free)(MemoryLayer* layer, Place* place);
  void (*close)(MemoryLayer* layer);

  // For one thread, after `enter`.

  void (*enter)(MemoryLayer* layer);
  // Starts a copy. Copies of a layer are placed in the order in which they are started.
  CopyStart (*copy)(MemoryLayer* layer, const Place* to, const Place* from, size_t bytes);
  // A number for all copies started so far; 0 on failure.
  uint64_t (*mark)(MemoryLayer* layer);
  // Whether the copies up to that mark are placed. Sets *has_failed when that will never be.
  bool (*has_reached)(MemoryLayer* layer, uint64_t mark, bool* has_failed);
  // Adds to words atomically, so that whoever sees a sum sees all that was placed before.
  bool (*add)(MemoryLayer* layer, const WordAdd* adds, int num_adds);
};

// Never NULL but for lack of memory.
MemoryLayer* memory_host_open(void);

// For the GPU whose context is current in the calling thread. NULL where there is none, or it cannot be used, which was
// logged.
MemoryLayer* memory_cuda_open(void);

#endif
