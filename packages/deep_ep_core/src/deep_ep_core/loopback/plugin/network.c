#define _GNU_SOURCE
#include "network.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "network_state.h"

// Longer than any message takes that can arrive at all.
static const time_t kMaxCloseS = 10;

uint64_t network_now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static bool open_stage(Network* network, MemoryKind kind) {
  MemoryLayer* layer = network->layers[kind];
  if (layer == NULL) return true;
  if (!layer->allocate(layer, (size_t)kStageSlotBytes * kNumStageSlots, &network->stages[kind])) return false;
  for (int slot = 0; slot < kNumStageSlots; slot++) network->free_slots[kind][slot] = slot;
  network->num_free_slots[kind] = kNumStageSlots;
  return true;
}

static bool start(Network* network) {
  Control* control = network->control;
  network->is_lost = calloc((size_t)control->num_ranks, sizeof *network->is_lost);
  if (network->is_lost == NULL || !faults_read(control->rank, &network->faults) ||
      !counters_open(&network->counters, control->rank, control->num_ranks)) {
    return false;
  }
  network->layers[kMemoryHost] = memory_host_open();
  network->layers[kMemoryCuda] = memory_cuda_open();
  if (network->layers[kMemoryHost] == NULL) return false;
  if (faults_hold_messages(&network->faults) &&
      !(open_stage(network, kMemoryHost) && open_stage(network, kMemoryCuda))) {
    return false;
  }
  network->has_thread = pthread_create(&network->thread, NULL, network_engine, network) == 0;
  return network->has_thread;
}

Network* network_open(Control* control) {
  Network* network = calloc(1, sizeof *network);
  if (network == NULL) {
    control_detach(control);
    return NULL;
  }
  network->control = control;
  pthread_mutex_init(&network->mutex, NULL);
  pthread_cond_init(&network->lanes_changed, NULL);
  network->submitted.end = &network->submitted.first;
  network->queue.end = &network->queue.first;
  if (!start(network)) {
    LOOPBACK_WARN("rank %d cannot start its network", control->rank);
    network_close(network);
    return NULL;
  }
  return network;
}

void network_close(Network* network) {
  if (network->has_thread) {
    atomic_store(&network->is_closing, true);
    control_ring(network->control, network->control->rank);
    pthread_join(network->thread, NULL);
  }
  while (network->all_lanes != NULL) network_close_lanes(network->all_lanes);
  for (uint64_t idx = 0; idx < network->num_memories; idx++) {
    if (network->memories[idx] != NULL) network_deregister(network, network->memories[idx]);
  }
  for (int kind = 0; kind < kNumLayers; kind++) {
    MemoryLayer* layer = network->layers[kind];
    if (layer == NULL) continue;
    if (network->stages[kind].kind != 0) layer->free(layer, &network->stages[kind]);
    layer->close(layer);
  }
  counters_close(&network->counters);
  control_detach(network->control);
  pthread_cond_destroy(&network->lanes_changed);
  pthread_mutex_destroy(&network->mutex);
  free(network->is_lost);
  free(network->memories);
  free(network);
}

static bool add_memory(Network* network, Memory* memory) {
  pthread_mutex_lock(&network->mutex);
  Memory** grown = realloc(network->memories, sizeof *grown * (network->num_memories + 1));
  if (grown != NULL) {
    network->memories = grown;
    memory->idx = network->num_memories++;
    grown[memory->idx] = memory;
  }
  pthread_mutex_unlock(&network->mutex);
  return grown != NULL;
}

// Between two barriers: the first says that all shares are written, the second that all were read.
static bool exchange(Network* network, MemoryLayer* layer, Memory* memory) {
  Control* control = network->control;
  if (!control_barrier(control)) return false;
  bool is_ok = true;
  for (int peer = 0; peer < control->num_ranks && is_ok; peer++) {
    const MemoryShare* share = &control->cards[peer].share;
    if (peer == control->rank || share->kind == 0) continue;
    int pid = control_pid(control, peer);
    is_ok = layer->attach(layer, share, pid, control->pidfds[peer], &memory->places[peer]);
    if (!is_ok) LOOPBACK_WARN("rank %d cannot reach the memory of rank %d", control->rank, peer);
  }
  return control_barrier(control) && is_ok;
}

Memory* network_register(Network* network, void* address, size_t bytes, MemoryKind kind) {
  Control* control = network->control;
  MemoryLayer* layer = network->layers[kind];
  Memory* memory = calloc(1, sizeof *memory);
  Place* places = calloc((size_t)control->num_ranks, sizeof *places);
  if (layer == NULL || memory == NULL || places == NULL) {
    if (layer == NULL) LOOPBACK_WARN("rank %d has no GPU whose memory could be registered", control->rank);
    free(memory);
    free(places);
    return NULL;
  }
  memory->bytes = bytes;
  memory->places = places;
  places[control->rank] = (Place){.kind = kind, .address = (uint64_t)address};
  MemoryShare* share = &control->cards[control->rank].share;
  layer->share(layer, address, bytes, share);
  // Before peers may signal it, which is after the exchange.
  bool is_known = add_memory(network, memory);
  bool is_ok = exchange(network, layer, memory) && is_known;
  layer->unshare(layer, share);
  if (is_ok) return memory;
  if (is_known) {
    network_deregister(network, memory);
  } else {
    free(places);
    free(memory);
  }
  return NULL;
}

void network_deregister(Network* network, Memory* memory) {
  pthread_mutex_lock(&network->mutex);
  network->memories[memory->idx] = NULL;
  pthread_mutex_unlock(&network->mutex);
  for (int peer = 0; peer < network->control->num_ranks; peer++) {
    Place* place = &memory->places[peer];
    if (place->mapping != 0) network->layers[place->kind]->detach(network->layers[place->kind], place);
  }
  free(memory->places);
  free(memory);
}

Lanes* network_open_lanes(Network* network, int num_lanes) {
  Lanes* lanes = calloc(1, sizeof *lanes);
  LaneWalk* walks = calloc((size_t)num_lanes * (size_t)network->control->num_ranks, sizeof *walks);
  if (lanes == NULL || walks == NULL) {
    free(lanes);
    free(walks);
    return NULL;
  }
  *lanes = (Lanes){.network = network, .num_lanes = num_lanes, .walks = walks};
  pthread_mutex_lock(&network->mutex);
  lanes->next = network->all_lanes;
  network->all_lanes = lanes;
  pthread_mutex_unlock(&network->mutex);
  return lanes;
}

static void unlink_lanes(Network* network, const Lanes* lanes) {
  Lanes** link = &network->all_lanes;
  while (*link != lanes) link = &(*link)->next;
  *link = lanes->next;
}

void network_close_lanes(Lanes* lanes) {
  Network* network = lanes->network;
  struct timespec limit;
  clock_gettime(CLOCK_REALTIME, &limit);
  limit.tv_sec += kMaxCloseS + (time_t)(network->faults.delay_ns / 1000000000u);
  pthread_mutex_lock(&network->mutex);
  atomic_store(&lanes->is_closing, true);
  control_ring(network->control, network->control->rank);
  bool is_in_time = true;
  // After its end the engine leaves nothing under way.
  while (lanes->num_underway != 0 && is_in_time) {
    is_in_time = pthread_cond_timedwait(&network->lanes_changed, &network->mutex, &limit) == 0;
  }
  unlink_lanes(network, lanes);
  if (lanes->num_underway != 0) {
    // The engine still has requests that point here, so the memory has to stay.
    LOOPBACK_WARN("rank %d: %d messages did not arrive within %d s", network->control->rank, lanes->num_underway,
                  (int)kMaxCloseS);
    pthread_mutex_unlock(&network->mutex);
    return;
  }
  while (lanes->first_open != NULL) network_free_request(lanes->first_open);
  pthread_mutex_unlock(&network->mutex);
  free(lanes->walks);
  free(lanes);
}

Network* lanes_network(const Lanes* lanes) { return lanes->network; }

static bool is_inside(const Memory* memory, uint64_t offset, size_t bytes) {
  return offset <= memory->bytes && bytes <= memory->bytes - offset;
}

static Place place_at(const Memory* memory, int rank, uint64_t offset) {
  Place place = memory->places[rank];
  place.address += offset;
  return place;
}

static bool is_valid(const Lanes* lanes, const Message* message) {
  const Control* control = lanes->network->control;
  if (message->lane_idx < 0 || message->lane_idx >= lanes->num_lanes || message->rank < 0 ||
      message->rank >= control->num_ranks) {
    LOOPBACK_WARN("rank %d: no context %d to rank %d (there are %d contexts and %d ranks)", control->rank,
                  message->lane_idx, message->rank, lanes->num_lanes, control->num_ranks);
    return false;
  }
  if (message->bytes != 0 && (!is_inside(message->local, message->local_offset, message->bytes) ||
                              !is_inside(message->remote, message->remote_offset, message->bytes))) {
    LOOPBACK_WARN("rank %d: %zu bytes at local offset %llu and at offset %llu of rank %d must lie in memory of %zu and "
                  "%zu bytes",
                  control->rank, message->bytes, (unsigned long long)message->local_offset,
                  (unsigned long long)message->remote_offset, message->rank, message->local->bytes,
                  message->remote->bytes);
    return false;
  }
  if (message->bytes != 0 && message->remote->places[message->rank].kind == 0) {
    LOOPBACK_WARN("rank %d: memory %llu of rank %d has no handle that could be exported; ncclMemAlloc gives one",
                  control->rank, (unsigned long long)message->remote->idx, message->rank);
    return false;
  }
  if (message->signal_memory != NULL &&
      (!is_inside(message->signal_memory, message->signal_offset, sizeof(uint64_t)) ||
       message->signal_offset % sizeof(uint64_t) != 0)) {
    LOOPBACK_WARN("rank %d: a signal must be an aligned word of its memory of %zu bytes (got offset %llu)",
                  control->rank, message->signal_memory->bytes, (unsigned long long)message->signal_offset);
    return false;
  }
  return true;
}

static void count(Network* network, const Message* message) {
  PeerCounters* counters = &network->counters.peers[message->rank];
  if (message->kind == kGet) {
    atomic_fetch_add(&counters->num_gets, 1);
    atomic_fetch_add(&counters->get_bytes, message->bytes);
  } else if (message->kind == kFlush) {
    atomic_fetch_add(&counters->num_flushes, 1);
  } else {
    atomic_fetch_add(&counters->num_puts, message->bytes != 0);
    atomic_fetch_add(&counters->put_bytes, message->bytes);
    atomic_fetch_add(&counters->num_signals, message->signal_memory != NULL);
  }
}

// Falls silent where the faults ask for it, before the message that would be one too many.
static void count_down_to_silence(Network* network, const Message* message) {
  int rank = network->control->rank;
  if (network->faults.silent_rank != rank || message->rank == rank) return;
  if (network->num_sent++ >= network->faults.silent_after) {
    atomic_store(&network->control->cards[rank].is_silent, 1);
  }
}

static void fill(Request* request, Lanes* lanes, const Message* message) {
  *request = (Request){
      .lanes = lanes,
      .kind = message->kind,
      .lane_idx = message->lane_idx,
      .rank = message->rank,
      .bytes = message->bytes,
      .is_strong = message->is_strong,
      .stage_slot = -1,
      .state = kRequestOpen,
  };
  if (message->signal_memory != NULL) {
    request->has_signal = true;
    request->signal = (SignalMessage){message->signal_memory->idx, message->signal_offset, message->signal_value};
  }
  if (message->bytes != 0) {
    Place local = place_at(message->local, lanes->network->control->rank, message->local_offset);
    Place remote = place_at(message->remote, message->rank, message->remote_offset);
    request->from = message->kind == kGet ? remote : local;
    request->to = message->kind == kGet ? local : remote;
  }
}

Request* network_submit(Lanes* lanes, const Message* message) {
  Network* network = lanes->network;
  if (!is_valid(lanes, message)) return NULL;
  Request* request = malloc(sizeof *request);
  if (request == NULL) return NULL;
  fill(request, lanes, message);
  count(network, message);
  pthread_mutex_lock(&network->mutex);
  count_down_to_silence(network, message);
  request->due_ns = network_now_ns() + faults_next_delay_ns(&network->faults);
  request->next_open = lanes->first_open;
  if (lanes->first_open != NULL) lanes->first_open->previous_open = request;
  lanes->first_open = request;
  lanes->num_underway++;
  *network->submitted.end = request;
  network->submitted.end = &request->next;
  pthread_mutex_unlock(&network->mutex);
  control_ring(network->control, network->control->rank);
  return request;
}

void network_free_request(Request* request) {
  if (request->previous_open != NULL) {
    request->previous_open->next_open = request->next_open;
  } else {
    request->lanes->first_open = request->next_open;
  }
  if (request->next_open != NULL) request->next_open->previous_open = request->previous_open;
  free(request);
}

RequestState network_test(Network* network, Request* request) {
  if (atomic_load(&network->has_failed)) return kRequestFailed;
  RequestState state = (RequestState)atomic_load_explicit(&request->state, memory_order_acquire);
  if (state == kRequestOpen) return state;
  pthread_mutex_lock(&network->mutex);
  request->is_tested = true;
  if (request->is_finished) network_free_request(request);
  pthread_mutex_unlock(&network->mutex);
  return state;
}

bool network_has_failed(Network* network) { return atomic_load(&network->has_failed); }
