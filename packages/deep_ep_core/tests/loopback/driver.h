// What the scenarios of the plugin's test driver share: one process a rank, the plugin's table, and registered memory.
#ifndef LOOPBACK_DRIVER_H
#define LOOPBACK_DRIVER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "nccl_abi.h"

enum { kMaxRanks = 8, kNumContexts = 3, kNumSignals = 4096 };

typedef struct {
  int rank;
  int num_ranks;
  uint64_t seed;
  int num_rounds;
  const NcclRmaPluginV16* plugin;
  void* comm;
  void* context;
  int kind;  // of memory

  size_t window_bytes;
  char* window;
  void* window_memory;
  char* source;
  void* source_memory;
  uint64_t* signals;
  void* signal_memory;
} Rank;

#define CHECK(condition, ...)                                                       \
  do {                                                                              \
    if (!(condition)) {                                                             \
      fprintf(stderr, "%s:%d: not true: %s: ", __FILE__, __LINE__, #condition);     \
      fprintf(stderr, __VA_ARGS__);                                                 \
      fprintf(stderr, "\n");                                                        \
      exit(1);                                                                      \
    }                                                                               \
  } while (0)

// Waits until a request is done.
void finish(Rank* self, void* request);
// Whether a request is done now.
bool is_done(Rank* self, void* request);

// `signal` < 0 is none.
void* put(Rank* self, int context, int peer, size_t from, size_t to, size_t bytes, int signal, uint64_t value,
          bool is_strong);
void* get(Rank* self, int context, int peer, size_t from, size_t to, size_t bytes);
void* flush(Rank* self, int context, int peer);

uint64_t read_signal(Rank* self, int signal);
void wait_signal(Rank* self, int signal, uint64_t least);

// Meets all other ranks, by signals at the end of the signal memory.
void meet(Rank* self);

double now_s(void);
uint64_t next_random(uint64_t* state);

typedef void Scenario(Rank* self);
Scenario run_sizes, run_gets, run_random, run_early, run_silent, run_dead, run_counted, run_misuse, run_reordered;

#endif
