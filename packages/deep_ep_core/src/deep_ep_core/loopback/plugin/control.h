// Owns the memory that the ranks of one connection share: a card a rank, and a ring of signals for each pair of ranks.
// It is an anonymous file of rank 0's, which the others reach through its descriptor. So it has no name that could
// clash or be left behind, and is gone with the last process, however that ends.
#ifndef DEEP_EP_CORE_LOOPBACK_CONTROL_H
#define DEEP_EP_CORE_LOOPBACK_CONTROL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { kRingSlots = 1024 };

// What `listen` puts into NCCL's handle.
typedef struct {
  uint64_t magic;
  int32_t pid;
  int32_t fd;
} ControlHandle;

// How a peer reaches memory that a rank registered.
typedef struct {
  int32_t kind;  // MemoryKind; 0 where the owner alone can reach it
  int32_t fd;
  uint64_t address;       // in the owner
  uint64_t file_bytes;    // of what `fd` names
  uint64_t offset_bytes;  // of the memory in it
} MemoryShare;

// The destination adds `value` to a word of memory that it registered as number `memory_idx`.
typedef struct {
  uint64_t memory_idx;
  uint64_t offset_bytes;
  uint64_t value;
} SignalMessage;

// One writer, one reader; a process that dies at any point leaves it readable.
typedef struct {
  _Alignas(64) atomic_uint_least64_t num_read;
  _Alignas(64) atomic_uint_least64_t num_written;
  _Alignas(64) SignalMessage slots[kRingSlots];
} SignalRing;

typedef struct {
  _Alignas(64) atomic_uint_least32_t doorbell;  // a futex
  atomic_uint_least32_t is_asleep;
  _Alignas(64) atomic_uint_least64_t num_barriers;
  atomic_uint_least32_t is_silent;  // plays dead, see faults.h
  MemoryShare share;
} RankCard;

typedef struct {
  int num_ranks;
  int rank;
  RankCard* cards;
  SignalRing* rings;
  int* pids;
  int* pidfds;
  void* mapping;
  size_t mapping_bytes;
  uint64_t num_barriers;
} Control;

// Makes the file whose descriptor goes into the handle. Returns it, or -1.
int control_listen(ControlHandle* handle);

// Attaches a rank; all ranks must. `fd` is what this rank's `control_listen` returned, and stays the caller's. NULL on
// failure, which was logged.
Control* control_attach(const ControlHandle* const* handles, int num_ranks, int rank, int fd);
void control_detach(Control* control);

// Waits for all ranks. False when one of them died, which was logged.
bool control_barrier(Control* control);

bool control_is_alive(const Control* control, int rank);

// The process of a rank.
int control_pid(const Control* control, int rank);

// Posts a signal to a rank, and wakes it. False when the ring to it is full.
bool control_post(Control* control, int rank, const SignalMessage* message);

// Takes the oldest signal from a rank. False when there is none.
bool control_take(Control* control, int rank, SignalMessage* message);

// Whether a signal waits from any rank.
bool control_has_signals(const Control* control);

// Wakes whoever sleeps at a rank's doorbell.
void control_ring(Control* control, int rank);

// For the sleeper, in this order: read the doorbell, note to sleep, look for work once more, sleep, note to be awake.
uint32_t control_doorbell(Control* control);
void control_note_asleep(Control* control, bool is_asleep);
void control_sleep(Control* control, uint32_t seen_doorbell, uint64_t max_ns);

#endif
