// Owns the make-believe network card of one rank in one connection: a thread that carries messages, in the order and at
// the time that GIN's rules and the asked faults allow, and applies the signals that arrive.
#ifndef DEEP_EP_CORE_LOOPBACK_NETWORK_H
#define DEEP_EP_CORE_LOOPBACK_NETWORK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "control.h"
#include "memory.h"

typedef struct Network Network;
typedef struct Lanes Lanes;
typedef struct Request Request;

// Memory that all ranks registered together, each its own.
typedef struct {
  uint64_t idx;
  size_t bytes;
  Place* places;  // [num_ranks]
} Memory;

typedef enum { kPut, kGet, kFlush } RequestKind;

// What `network_submit` is asked for. `local` and `remote` are NULL, and `bytes` 0, where no payload moves.
typedef struct {
  RequestKind kind;
  int lane_idx;  // in [0, num_lanes)
  int rank;
  const Memory* local;
  uint64_t local_offset;
  const Memory* remote;
  uint64_t remote_offset;
  size_t bytes;
  const Memory* signal_memory;  // NULL for no signal
  uint64_t signal_offset;
  uint64_t signal_value;
  bool is_strong;
} Message;

// Takes `control` over, also on failure, which returns NULL.
Network* network_open(Control* control);
void network_close(Network* network);

// Registers memory; all ranks must, in the same order. NULL on failure, which was logged.
Memory* network_register(Network* network, void* address, size_t bytes, MemoryKind kind);
void network_deregister(Network* network, Memory* memory);

// Independent queues to each peer, `num_lanes` of them: GIN's contexts.
Lanes* network_open_lanes(Network* network, int num_lanes);
// Waits for all messages that can still arrive; what cannot is forgotten, and so are all requests.
void network_close_lanes(Lanes* lanes);

Network* lanes_network(const Lanes* lanes);

// Starts a message. NULL when it is not valid, which was logged, or for lack of memory.
Request* network_submit(Lanes* lanes, const Message* message);

typedef enum { kRequestOpen, kRequestDone, kRequestFailed } RequestState;

// Whether the local end of a message is done with. A request that is must not be asked again.
RequestState network_test(Network* network, Request* request);

// Whether the card itself has failed, so that nothing moves any more.
bool network_has_failed(Network* network);

#endif
