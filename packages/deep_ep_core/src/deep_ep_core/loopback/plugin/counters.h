// Owns the counts of what this rank sent, by peer. Where EP_LOOPBACK_COUNTERS names a folder they lie in a file there,
// one a rank and connection, which deep_ep_core.loopback.counters reads; else in memory of this process.
#ifndef DEEP_EP_CORE_LOOPBACK_COUNTERS_H
#define DEEP_EP_CORE_LOOPBACK_COUNTERS_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

// Counted when NCCL asks for the operation, whatever becomes of it.
typedef struct {
  atomic_uint_least64_t num_puts;  // with a payload
  atomic_uint_least64_t put_bytes;
  atomic_uint_least64_t num_signals;  // with or without one
  atomic_uint_least64_t num_gets;
  atomic_uint_least64_t get_bytes;
  atomic_uint_least64_t num_flushes;
} PeerCounters;

typedef struct {
  PeerCounters* peers;  // [num_ranks]
  void* mapping;
  size_t mapping_bytes;
} Counters;

// True unless the file cannot be made, which was logged.
_Bool counters_open(Counters* counters, int rank, int num_ranks);
void counters_close(Counters* counters);

#endif
