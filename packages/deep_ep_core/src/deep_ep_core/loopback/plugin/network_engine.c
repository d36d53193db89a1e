// The thread of a network card. It alone copies, posts and applies, so none of that needs a lock.
#define _GNU_SOURCE
#include <sched.h>
#include <stdlib.h>

#include "log.h"
#include "network_state.h"

// Between looks at whether peers live; also the longest sleep, since a death rings no bell.
static const uint64_t kLifeCheckNs = 20000000;
// A wake costs microseconds, so the engine looks around for a while before it sleeps.
static const uint64_t kSpinNs = 50000;

static void take_submitted(Network* network) {
  pthread_mutex_lock(&network->mutex);
  if (network->submitted.first != NULL) {
    *network->queue.end = network->submitted.first;
    network->queue.end = network->submitted.end;
    network->submitted = (RequestQueue){.first = NULL, .end = &network->submitted.first};
  }
  pthread_mutex_unlock(&network->mutex);
}

static void fail(Network* network, const char* what) {
  if (!atomic_exchange(&network->has_failed, true)) {
    LOOPBACK_WARN("rank %d: %s failed; its network stops", network->control->rank, what);
  }
}

// ---- Signals that arrive

static void add_words(Network* network, MemoryKind kind, const WordAdd* adds, int num_adds) {
  MemoryLayer* layer = network->layers[kind];
  if (num_adds != 0 && !layer->add(layer, adds, num_adds)) fail(network, "adding to signals");
}

// The mutex is held: a registration may end meanwhile, and must not before the sums are on their way.
static bool apply_from(Network* network, int rank) {
  WordAdd adds[kNumLayers][kMaxWordAdds];
  int num_adds[kNumLayers] = {0};
  SignalMessage message;
  int num_taken = 0;
  while (num_taken < kMaxWordAdds && control_take(network->control, rank, &message)) {
    num_taken++;
    Memory* memory = message.memory_idx < network->num_memories ? network->memories[message.memory_idx] : NULL;
    if (memory == NULL) {
      LOOPBACK_INFO("rank %d: a signal of rank %d came after its memory was deregistered", network->control->rank,
                    rank);
      continue;
    }
    const Place* place = &memory->places[network->control->rank];
    WordAdd add = {.address = place->address + message.offset_bytes, .value = message.value};
    adds[place->kind][num_adds[place->kind]++] = add;
  }
  for (int kind = kMemoryHost; kind < kNumLayers; kind++) {
    add_words(network, (MemoryKind)kind, adds[kind], num_adds[kind]);
  }
  return num_taken != 0;
}

static bool apply_signals(Network* network) {
  if (!control_has_signals(network->control)) return false;
  bool has_applied = false;
  pthread_mutex_lock(&network->mutex);
  for (int rank = 0; rank < network->control->num_ranks; rank++) has_applied |= apply_from(network, rank);
  pthread_mutex_unlock(&network->mutex);
  return has_applied;
}

// ---- Messages that leave

static bool is_reachable(const Network* network, int rank) {
  const Control* control = network->control;
  if (rank == control->rank) return true;
  return !atomic_load(&network->is_lost[rank]) && !atomic_load(&control->cards[rank].is_silent) &&
         !atomic_load(&control->cards[control->rank].is_silent);
}

static void lose(Network* network, int rank) {
  if (!atomic_exchange(&network->is_lost[rank], true)) {
    // Not worth a warning: at the end of a job some process is the first to go.
    LOOPBACK_INFO("rank %d: the process of rank %d has ended; what is sent to it never arrives",
                  network->control->rank, rank);
  }
}

static bool start_copy(Network* network, Request* request, const Place* to, const Place* from) {
  bool is_cuda = to->kind == kMemoryCuda || from->kind == kMemoryCuda;
  request->layer = network->layers[is_cuda ? kMemoryCuda : kMemoryHost];
  switch (request->layer->copy(request->layer, to, from, request->bytes)) {
    case kCopyStarted:
      request->mark = 0;  // given at the end of the walk
      return true;
    case kCopyPeerGone:
      lose(network, request->rank);
      return false;
    case kCopyFailed:
      break;
  }
  fail(network, "a copy");
  return false;
}

// Takes the payload from the source at once. So the request is done, as NCCL sees it, long before its data arrives:
// code that takes the one for the other is found out.
static void stage(Network* network, Request* request) {
  int kind = request->from.kind;
  if (request->bytes > kStageSlotBytes || network->num_free_slots[kind] == 0) return;
  int slot = network->free_slots[kind][network->num_free_slots[kind] - 1];
  Place to = network->stages[kind];
  to.address += (uint64_t)slot * kStageSlotBytes;
  if (!start_copy(network, request, &to, &request->from)) return;
  network->num_free_slots[kind]--;
  request->stage_slot = slot;
  request->from = to;
  request->progress = kStaging;
}

// Ends a held-up put for NCCL as early as can be, once.
static void end_locally(Network* network, Request* request) {
  if (!faults_hold_messages(&network->faults) || request->kind != kPut || request->progress != kWaiting ||
      request->stage_slot >= 0 || !is_reachable(network, request->rank)) {
    return;
  }
  if (request->bytes == 0) {
    atomic_store_explicit(&request->state, kRequestDone, memory_order_release);
  } else {
    stage(network, request);
  }
}

// Without reordering a lane is a pipe: nothing in it overtakes. With it, data lands in any order, a weak signal waits
// for its own data only, and a strong one for that of all earlier puts of its lane, which is all that GIN promises.
static bool may_signal(const Network* network, const Request* request, const LaneWalk* lane) {
  if (!network->faults.has_reordering) return !lane->has_unplaced_put && !lane->has_unsent_signal;
  return !request->is_strong || !lane->has_unplaced_put;
}

// Takes a request as far as it goes now. Whether it went anywhere.
static bool advance(Network* network, Request* request, const LaneWalk* lane, uint64_t now_ns) {
  bool has_moved = false;
  bool has_failed = false;
  if (request->progress == kStaging && request->layer->has_reached(request->layer, request->mark, &has_failed)) {
    atomic_store_explicit(&request->state, kRequestDone, memory_order_release);
    request->progress = kWaiting;
    has_moved = true;
  }
  if (request->progress == kWaiting && is_reachable(network, request->rank) && now_ns >= request->due_ns) {
    if (request->kind == kFlush) {
      // It follows the gets that it makes visible.
      if (!lane->has_unplaced_get) request->progress = kPlaced;
    } else if (request->bytes == 0) {
      request->progress = kPlaced;
    } else if (start_copy(network, request, &request->to, &request->from)) {
      request->progress = kCopying;
      return true;
    }
  }
  if (request->progress == kCopying && request->layer->has_reached(request->layer, request->mark, &has_failed)) {
    request->progress = kPlaced;
    has_moved = true;
  }
  if (has_failed) fail(network, "a copy");
  if (request->progress == kPlaced && is_reachable(network, request->rank)) {
    bool is_sent = !request->has_signal || (may_signal(network, request, lane) &&
                                            control_post(network->control, request->rank, &request->signal));
    if (is_sent) request->progress = kFinished;
    has_moved |= is_sent;
  }
  return has_moved;
}

static void note_in_lane(const Request* request, LaneWalk* lane) {
  bool is_placed = request->progress == kPlaced || request->progress == kFinished;
  if (request->kind == kPut) {
    lane->has_unplaced_put |= !is_placed && request->bytes != 0;
    lane->has_unsent_signal |= request->has_signal && request->progress != kFinished;
  } else if (request->kind == kGet) {
    lane->has_unplaced_get |= !is_placed;
  }
}

static void finish(Network* network, Request* request) {
  if (request->stage_slot >= 0) {
    int kind = request->from.kind;
    network->free_slots[kind][network->num_free_slots[kind]++] = request->stage_slot;
  }
  if (request->progress == kFinished) atomic_store_explicit(&request->state, kRequestDone, memory_order_release);
  pthread_mutex_lock(&network->mutex);
  Lanes* lanes = request->lanes;
  request->is_finished = true;
  lanes->num_underway--;
  if (lanes->num_underway == 0) pthread_cond_broadcast(&network->lanes_changed);
  if (request->is_tested) network_free_request(request);
  pthread_mutex_unlock(&network->mutex);
}

static LaneWalk* lane_of(const Network* network, const Request* request) {
  return &request->lanes->walks[request->lane_idx * network->control->num_ranks + request->rank];
}

// Copies that this walk started get its mark.
static void mark_copies(Network* network) {
  uint64_t marks[kNumLayers] = {0};
  for (Request* request = network->queue.first; request != NULL; request = request->next) {
    if (request->mark != 0 || (request->progress != kCopying && request->progress != kStaging)) continue;
    int kind = request->layer == network->layers[kMemoryCuda] ? kMemoryCuda : kMemoryHost;
    if (marks[kind] == 0) marks[kind] = request->layer->mark(request->layer);
    if (marks[kind] == 0) fail(network, "marking copies");
    request->mark = marks[kind];
  }
}

// One look at every request that is under way, oldest first. Whether any moved.
static bool walk(Network* network, bool is_ending) {
  if (network->queue.first == NULL) return false;
  bool has_moved = false;
  uint64_t now_ns = network_now_ns();
  for (Request* request = network->queue.first; request != NULL; request = request->next) {
    *lane_of(network, request) = (LaneWalk){0};
  }
  Request** link = &network->queue.first;
  while (*link != NULL) {
    Request* request = *link;
    LaneWalk* lane = lane_of(network, request);
    end_locally(network, request);
    has_moved |= advance(network, request, lane, now_ns);
    note_in_lane(request, lane);
    bool is_hopeless = atomic_load(&network->has_failed) || is_ending ||
                       (atomic_load(&request->lanes->is_closing) && !is_reachable(network, request->rank));
    if (request->progress == kFinished || is_hopeless) {
      *link = request->next;
      finish(network, request);
      has_moved = true;
    } else {
      link = &request->next;
    }
  }
  network->queue.end = link;
  mark_copies(network);
  return has_moved;
}

// Whether something will move without a bell: a copy that runs, a message whose time comes, a ring that is full.
static bool has_movable(const Network* network) {
  for (const Request* request = network->queue.first; request != NULL; request = request->next) {
    if (is_reachable(network, request->rank) || request->progress == kStaging || request->progress == kCopying) {
      return true;
    }
  }
  return false;
}

static void look_for_dead(Network* network) {
  for (int rank = 0; rank < network->control->num_ranks; rank++) {
    if (!atomic_load(&network->is_lost[rank]) && !control_is_alive(network->control, rank)) lose(network, rank);
  }
}

static bool has_submitted(Network* network) {
  pthread_mutex_lock(&network->mutex);
  bool has_any = network->submitted.first != NULL;
  pthread_mutex_unlock(&network->mutex);
  return has_any;
}

static void sleep_until_rung(Network* network) {
  Control* control = network->control;
  uint32_t seen = control_doorbell(control);
  control_note_asleep(control, true);
  if (!control_has_signals(control) && !has_submitted(network) && !atomic_load(&network->is_closing)) {
    control_sleep(control, seen, kLifeCheckNs);
  }
  control_note_asleep(control, false);
}

void* network_engine(void* argument) {
  Network* network = argument;
  for (int kind = 0; kind < kNumLayers; kind++) {
    if (network->layers[kind] != NULL) network->layers[kind]->enter(network->layers[kind]);
  }
  uint64_t last_move_ns = network_now_ns();
  uint64_t next_check_ns = 0;
  while (!atomic_load(&network->is_closing)) {
    take_submitted(network);
    bool has_moved = apply_signals(network);
    has_moved |= walk(network, false);
    uint64_t now_ns = network_now_ns();
    if (now_ns >= next_check_ns) {
      look_for_dead(network);
      next_check_ns = now_ns + kLifeCheckNs;
    }
    if (has_moved) {
      last_move_ns = now_ns;
    } else if (has_movable(network) || now_ns - last_move_ns < kSpinNs) {
      sched_yield();
    } else {
      sleep_until_rung(network);
    }
  }
  take_submitted(network);
  walk(network, true);
  return NULL;
}
