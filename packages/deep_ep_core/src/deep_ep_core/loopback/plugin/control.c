#define _GNU_SOURCE
#include "control.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "log.h"
#include "process.h"

static const uint64_t kMagic = 0x6465706c6f6f7031;  // "deploop1"
static const useconds_t kPollUs = 100;

int control_listen(ControlHandle* handle) {
  process_allow_peers();
  int fd = memfd_create("deep_ep_loopback", MFD_CLOEXEC);
  if (fd < 0) {
    LOOPBACK_WARN("memfd_create: %s", strerror(errno));
    return -1;
  }
  *handle = (ControlHandle){.magic = kMagic, .pid = getpid(), .fd = fd};
  return fd;
}

static size_t cards_bytes(int num_ranks) { return sizeof(RankCard) * (size_t)num_ranks; }

static size_t mapping_bytes(int num_ranks) {
  return cards_bytes(num_ranks) + sizeof(SignalRing) * (size_t)num_ranks * (size_t)num_ranks;
}

// Rank 0 gives its file the size; that the file has it tells the others that it can be mapped.
static bool wait_for_size(int fd, size_t bytes, int owner_pidfd) {
  struct stat state;
  while (fstat(fd, &state) == 0) {
    if ((size_t)state.st_size == bytes) return true;
    if (!process_is_alive(owner_pidfd)) return false;
    usleep(kPollUs);
  }
  return false;
}

static void* map_file(int fd, size_t bytes) {
  void* mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  return mapping == MAP_FAILED ? NULL : mapping;
}

static void* map_control(const ControlHandle* handle, const Control* control, int own_fd) {
  size_t bytes = mapping_bytes(control->num_ranks);
  if (control->rank == 0) return ftruncate(own_fd, (off_t)bytes) == 0 ? map_file(own_fd, bytes) : NULL;
  int fd = process_copy_fd(control->pidfds[0], handle->fd);
  if (fd < 0) return NULL;
  void* mapping = wait_for_size(fd, bytes, control->pidfds[0]) ? map_file(fd, bytes) : NULL;
  close(fd);
  return mapping;
}

Control* control_attach(const ControlHandle* const* handles, int num_ranks, int rank, int fd) {
  Control* control = calloc(1, sizeof *control);
  int* pids = malloc(sizeof(int) * (size_t)num_ranks);
  int* pidfds = malloc(sizeof(int) * (size_t)num_ranks);
  if (control == NULL || pids == NULL || pidfds == NULL) {
    free(control);
    free(pids);
    free(pidfds);
    return NULL;
  }
  *control = (Control){.num_ranks = num_ranks, .rank = rank, .pids = pids, .pidfds = pidfds};
  for (int peer = 0; peer < num_ranks; peer++) pidfds[peer] = -1;
  for (int peer = 0; peer < num_ranks; peer++) {
    pids[peer] = handles[peer]->pid;
    pidfds[peer] = handles[peer]->magic == kMagic ? process_open(pids[peer]) : -1;
    if (pidfds[peer] < 0) {
      LOOPBACK_WARN("rank %d: rank %d is no live process of this machine", rank, peer);
      control_detach(control);
      return NULL;
    }
  }
  control->mapping_bytes = mapping_bytes(num_ranks);
  control->mapping = map_control(handles[0], control, fd);
  if (control->mapping == NULL) {
    LOOPBACK_WARN("rank %d cannot map the control memory of rank 0, process %d: %s", rank, (int)handles[0]->pid,
                  strerror(errno));
    control_detach(control);
    return NULL;
  }
  control->cards = control->mapping;
  control->rings = (SignalRing*)((char*)control->mapping + cards_bytes(num_ranks));
  if (!control_barrier(control)) {
    control_detach(control);
    return NULL;
  }
  return control;
}

void control_detach(Control* control) {
  if (control->mapping != NULL) munmap(control->mapping, control->mapping_bytes);
  for (int peer = 0; peer < control->num_ranks; peer++) {
    if (control->pidfds[peer] >= 0) close(control->pidfds[peer]);
  }
  free(control->pids);
  free(control->pidfds);
  free(control);
}

bool control_is_alive(const Control* control, int rank) {
  return rank == control->rank || process_is_alive(control->pidfds[rank]);
}

int control_pid(const Control* control, int rank) { return control->pids[rank]; }

bool control_barrier(Control* control) {
  uint64_t round = ++control->num_barriers;
  atomic_store(&control->cards[control->rank].num_barriers, round);
  for (int peer = 0; peer < control->num_ranks; peer++) {
    atomic_uint_least64_t* reached = &control->cards[peer].num_barriers;
    while (atomic_load(reached) < round) {
      // A peer that arrived and then ended is no failure.
      if (!control_is_alive(control, peer) && atomic_load(reached) < round) {
        LOOPBACK_WARN("rank %d waits for rank %d, whose process ended", control->rank, peer);
        return false;
      }
      usleep(kPollUs);
    }
  }
  return true;
}

static SignalRing* ring_of(const Control* control, int from, int to) {
  return &control->rings[(size_t)from * (size_t)control->num_ranks + (size_t)to];
}

bool control_post(Control* control, int rank, const SignalMessage* message) {
  SignalRing* ring = ring_of(control, control->rank, rank);
  uint64_t num_written = atomic_load_explicit(&ring->num_written, memory_order_relaxed);
  if (num_written - atomic_load_explicit(&ring->num_read, memory_order_acquire) == kRingSlots) return false;
  ring->slots[num_written % kRingSlots] = *message;
  atomic_store_explicit(&ring->num_written, num_written + 1, memory_order_release);
  control_ring(control, rank);
  return true;
}

bool control_take(Control* control, int rank, SignalMessage* message) {
  SignalRing* ring = ring_of(control, rank, control->rank);
  uint64_t num_read = atomic_load_explicit(&ring->num_read, memory_order_relaxed);
  if (num_read == atomic_load_explicit(&ring->num_written, memory_order_acquire)) return false;
  *message = ring->slots[num_read % kRingSlots];
  atomic_store_explicit(&ring->num_read, num_read + 1, memory_order_release);
  return true;
}

bool control_has_signals(const Control* control) {
  for (int peer = 0; peer < control->num_ranks; peer++) {
    SignalRing* ring = ring_of(control, peer, control->rank);
    if (atomic_load(&ring->num_read) != atomic_load(&ring->num_written)) return true;
  }
  return false;
}

void control_ring(Control* control, int rank) {
  RankCard* card = &control->cards[rank];
  // Sequentially consistent against control_note_asleep: either the sleeper sees the work or this sees the sleeper.
  atomic_fetch_add(&card->doorbell, 1);
  if (atomic_load(&card->is_asleep)) syscall(SYS_futex, &card->doorbell, FUTEX_WAKE, 1, NULL, NULL, 0);
}

uint32_t control_doorbell(Control* control) { return atomic_load(&control->cards[control->rank].doorbell); }

void control_note_asleep(Control* control, bool is_asleep) {
  atomic_store(&control->cards[control->rank].is_asleep, is_asleep);
}

void control_sleep(Control* control, uint32_t seen_doorbell, uint64_t max_ns) {
  struct timespec limit = {.tv_sec = (time_t)(max_ns / 1000000000), .tv_nsec = (long)(max_ns % 1000000000)};
  syscall(SYS_futex, &control->cards[control->rank].doorbell, FUTEX_WAIT, seen_doorbell, &limit, NULL, 0);
}
