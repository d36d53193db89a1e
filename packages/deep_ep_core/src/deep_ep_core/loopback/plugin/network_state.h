// Owns what the halves of the network share: `network.c`, which NCCL's threads call, and the engine's thread,
// `network_engine.c`.
#ifndef DEEP_EP_CORE_LOOPBACK_NETWORK_STATE_H
#define DEEP_EP_CORE_LOOPBACK_NETWORK_STATE_H

#include <pthread.h>
#include <stdatomic.h>

#include "counters.h"
#include "faults.h"
#include "network.h"

// Payloads up to this are taken from the source at once where messages are held up, as a network card would.
enum { kStageSlotBytes = 1 << 16, kNumStageSlots = 128 };
// Layers are indexed by MemoryKind.
enum { kNumLayers = 3 };

typedef enum {
  kWaiting,  // for its time, or its turn
  kStaging,  // being copied to this rank's own slot
  kCopying,
  kPlaced,    // its data is at the destination; a signal may have to wait
  kFinished,  // of no more concern to the engine
} Progress;

struct Request {
  // Under the network's mutex.
  Request* next_open;  // among all requests of its lanes that are not freed
  Request* previous_open;
  bool is_tested;
  bool is_finished;

  // The engine's, once it has taken the request.
  Request* next;  // in the order of submission
  Lanes* lanes;
  RequestKind kind;
  int lane_idx;
  int rank;
  size_t bytes;
  Place to;
  Place from;
  bool has_signal;
  bool is_strong;
  SignalMessage signal;
  Progress progress;
  uint64_t due_ns;
  MemoryLayer* layer;  // that copies it
  uint64_t mark;
  int stage_slot;  // -1 for none

  atomic_int state;  // RequestState
};

// What was seen of a lane to one peer in this walk over the requests, oldest first.
typedef struct {
  bool has_unplaced_put;
  bool has_unsent_signal;
  bool has_unplaced_get;
} LaneWalk;

struct Lanes {
  Network* network;
  int num_lanes;
  LaneWalk* walks;  // [num_lanes][num_ranks], the engine's
  Request* first_open;
  int num_underway;  // requests that the engine has, or will take
  atomic_bool is_closing;
  Lanes* next;
};

typedef struct {
  Request* first;
  Request** end;
} RequestQueue;

struct Network {
  Control* control;
  Counters counters;
  Faults faults;
  MemoryLayer* layers[kNumLayers];
  pthread_t thread;
  bool has_thread;

  pthread_mutex_t mutex;
  pthread_cond_t lanes_changed;
  Lanes* all_lanes;
  RequestQueue submitted;
  Memory** memories;  // by index; NULL once deregistered
  uint64_t num_memories;
  uint64_t num_sent;  // messages of this rank to others

  atomic_bool is_closing;
  atomic_bool has_failed;

  // The engine's.
  RequestQueue queue;
  atomic_bool* is_lost;  // [num_ranks]: nothing reaches it, or comes from it, any more
  Place stages[kNumLayers];
  int free_slots[kNumLayers][kNumStageSlots];
  int num_free_slots[kNumLayers];
};

void* network_engine(void* network);

uint64_t network_now_ns(void);

// Frees a request that neither NCCL nor the engine will look at again. With the mutex held.
void network_free_request(Request* request);

#endif
