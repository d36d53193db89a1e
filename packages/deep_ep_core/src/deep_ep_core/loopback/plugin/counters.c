#define _GNU_SOURCE
#include "counters.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "log.h"

typedef struct {
  char magic[8];
  uint32_t rank;
  uint32_t num_ranks;
} Header;

static int make_file(const char* folder, int rank, size_t bytes) {
  static atomic_int num_files;
  char path[PATH_MAX];
  int length = snprintf(path, sizeof path, "%s/rank%d.%d.%d.counters", folder, rank, (int)getpid(),
                        atomic_fetch_add(&num_files, 1));
  int fd = length < (int)sizeof path ? open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600) : -1;
  if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0) return fd;
  LOOPBACK_WARN("EP_LOOPBACK_COUNTERS must name a folder that can be written (%s: %s)", path, strerror(errno));
  if (fd >= 0) close(fd);
  return -1;
}

_Bool counters_open(Counters* counters, int rank, int num_ranks) {
  size_t bytes = sizeof(Header) + sizeof(PeerCounters) * (size_t)num_ranks;
  const char* folder = getenv("EP_LOOPBACK_COUNTERS");
  int fd = -1;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
  if (folder != NULL && folder[0] != '\0') {
    fd = make_file(folder, rank, bytes);
    if (fd < 0) return 0;
    flags = MAP_SHARED;
  }
  void* mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  if (fd >= 0) close(fd);
  if (mapping == MAP_FAILED) return 0;
  Header* header = mapping;
  header->rank = (uint32_t)rank;
  header->num_ranks = (uint32_t)num_ranks;
  // Last: a file without it is not complete.
  memcpy(header->magic, "eploopc1", sizeof header->magic);
  *counters = (Counters){.peers = (PeerCounters*)(header + 1), .mapping = mapping, .mapping_bytes = bytes};
  return 1;
}

void counters_close(Counters* counters) {
  if (counters->mapping != NULL) munmap(counters->mapping, counters->mapping_bytes);
  counters->mapping = NULL;
}
