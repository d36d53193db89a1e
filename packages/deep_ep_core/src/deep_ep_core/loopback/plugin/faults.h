// Owns the faults that a test can ask for, by variables of the environment. deep_ep_core.env documents them.
#ifndef DEEP_EP_CORE_LOOPBACK_FAULTS_H
#define DEEP_EP_CORE_LOOPBACK_FAULTS_H

#include <stdbool.h>
#include <stdint.h>

typedef struct {
  uint64_t delay_ns;    // EP_LOOPBACK_DELAY_US: how long a message is under way; with reordering, at most
  bool has_reordering;  // EP_LOOPBACK_REORDER is set: messages may overtake each other where GIN's rules permit
  uint64_t random;      // state of the generator that EP_LOOPBACK_REORDER seeds
  int silent_rank;      // EP_LOOPBACK_DROP_RANK, or -1: this rank's messages are lost, and those to it
  uint64_t silent_after;  // EP_LOOPBACK_DROP_AFTER: messages that this rank sends before that
} Faults;

// What the environment asks for. False when a value is no number, which was logged.
bool faults_read(int rank, Faults* faults);

// Whether messages are held up at all.
bool faults_hold_messages(const Faults* faults);

// How long the next message is under way.
uint64_t faults_next_delay_ns(Faults* faults);

#endif
