// Memory of processes, reached by process_vm_writev: it needs no mapping, so any memory will do, wherever it came from.
#define _GNU_SOURCE
#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

#include <unistd.h>

#include "log.h"
#include "memory.h"

// A copy stays in this process's hands for no longer than this much takes.
static const size_t kPieceBytes = (size_t)1 << 20;

static void host_share(MemoryLayer* layer, void* address, size_t bytes, MemoryShare* share) {
  (void)layer;
  *share = (MemoryShare){.kind = kMemoryHost, .fd = -1, .address = (uint64_t)address, .file_bytes = bytes};
}

static void host_unshare(MemoryLayer* layer, MemoryShare* share) {
  (void)layer;
  (void)share;
}

static bool host_attach(MemoryLayer* layer, const MemoryShare* share, int pid, int pidfd, Place* place) {
  (void)layer;
  (void)pidfd;
  *place = (Place){.kind = kMemoryHost, .pid = pid == getpid() ? 0 : pid, .address = share->address};
  return true;
}

static void host_detach(MemoryLayer* layer, Place* place) {
  (void)layer;
  (void)place;
}

static bool host_allocate(MemoryLayer* layer, size_t bytes, Place* place) {
  (void)layer;
  void* address = malloc(bytes);
  *place = (Place){.kind = kMemoryHost, .address = (uint64_t)address, .mapping = (uint64_t)address};
  return address != NULL;
}

static void host_free(MemoryLayer* layer, Place* place) {
  (void)layer;
  free((void*)place->mapping);
}

static void host_close(MemoryLayer* layer) { free(layer); }

static void host_enter(MemoryLayer* layer) { (void)layer; }

static CopyStart host_copy(MemoryLayer* layer, const Place* to, const Place* from, size_t bytes) {
  (void)layer;
  if (to->pid == 0 && from->pid == 0) {
    memmove((void*)to->address, (const void*)from->address, bytes);
    return kCopyStarted;
  }
  const Place* remote = to->pid != 0 ? to : from;
  const Place* local = to->pid != 0 ? from : to;
  size_t num_done = 0;
  while (num_done < bytes) {
    size_t piece = bytes - num_done < kPieceBytes ? bytes - num_done : kPieceBytes;
    struct iovec here = {.iov_base = (void*)(local->address + num_done), .iov_len = piece};
    struct iovec there = {.iov_base = (void*)(remote->address + num_done), .iov_len = piece};
    ssize_t moved = to->pid != 0 ? process_vm_writev(to->pid, &here, 1, &there, 1, 0)
                                 : process_vm_readv(from->pid, &here, 1, &there, 1, 0);
    if (moved < 0 && errno == ESRCH) return kCopyPeerGone;
    if (moved <= 0) {
      LOOPBACK_WARN("copy of %zu bytes %s process %d: %s", bytes, to->pid != 0 ? "to" : "from", remote->pid,
                    strerror(errno));
      return kCopyFailed;
    }
    // It may move less than it was asked to.
    num_done += (size_t)moved;
  }
  return kCopyStarted;
}

// Every copy is placed when `copy` returns.
static uint64_t host_mark(MemoryLayer* layer) {
  (void)layer;
  return 1;
}

static bool host_has_reached(MemoryLayer* layer, uint64_t mark, bool* has_failed) {
  (void)layer;
  (void)mark;
  (void)has_failed;
  return true;
}

static bool host_add(MemoryLayer* layer, const WordAdd* adds, int num_adds) {
  (void)layer;
  for (int i = 0; i < num_adds; i++) {
    __atomic_fetch_add((uint64_t*)adds[i].address, adds[i].value, __ATOMIC_ACQ_REL);
  }
  return true;
}

MemoryLayer* memory_host_open(void) {
  MemoryLayer* layer = malloc(sizeof *layer);
  if (layer == NULL) return NULL;
  *layer = (MemoryLayer){
      .share = host_share,
      .unshare = host_unshare,
      .attach = host_attach,
      .detach = host_detach,
      .allocate = host_allocate,
      .free = host_free,
      .close = host_close,
      .enter = host_enter,
      .copy = host_copy,
      .mark = host_mark,
      .has_reached = host_has_reached,
      .add = host_add,
  };
  return layer;
}
