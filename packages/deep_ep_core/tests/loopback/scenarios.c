// What the driver lets the plugin do. Values are unique to (source, destination, round, piece, position).
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "driver.h"

enum { kPieces = 48 };

static unsigned char value_of(int from, int to, uint64_t round, uint64_t piece, size_t i) {
  uint64_t state = ((uint64_t)from << 56) ^ ((uint64_t)to << 48) ^ (round << 24) ^ (piece << 12) ^ (i / 8);
  return (unsigned char)(next_random(&state) >> (8 * (i % 8)));
}

static void fill(char* data, size_t bytes, int from, int to, uint64_t round, uint64_t piece) {
  for (size_t i = 0; i < bytes; i++) data[i] = (char)value_of(from, to, round, piece, i);
}

static void check(const char* data, size_t bytes, int from, int to, uint64_t round, uint64_t piece) {
  for (size_t i = 0; i < bytes; i++) {
    CHECK((unsigned char)data[i] == value_of(from, to, round, piece, i),
          "from %d to %d round %llu piece %llu byte %zu of %zu", from, to, (unsigned long long)round,
          (unsigned long long)piece, i, bytes);
  }
}

// A ring of puts with signal and of gets, of every size.
void run_sizes(Rank* self) {
  static const size_t kSizes[] = {0,       1,           7,       8,       4095,     4096,    65536,
                                  1 << 20, (1 << 20) + 1, 3 << 20, 16 << 20, 64 << 20};
  int next = (self->rank + 1) % self->num_ranks;
  int previous = (self->rank + self->num_ranks - 1) % self->num_ranks;
  for (uint64_t i = 0; i < sizeof kSizes / sizeof kSizes[0]; i++) {
    if (kSizes[i] > self->window_bytes) break;
    fill(self->source, kSizes[i], self->rank, next, i, 0);
    finish(self, put(self, 0, next, 0, 0, kSizes[i], 0, 1, true));
    wait_signal(self, 0, i + 1);
    check(self->window, kSizes[i], previous, self->rank, i, 0);
    meet(self);
    // What the next rank's window holds is what it got from here.
    memset(self->source, 0, kSizes[i]);
    void* request = get(self, 1, next, 0, 0, kSizes[i]);
    // A flush is done when the gets before it are there.
    finish(self, flush(self, 1, next));
    check(self->source, kSizes[i], self->rank, next, i, 0);
    finish(self, request);
    meet(self);
  }
}

// A flush of a lane is done when the gets before it are there, however the network orders them.
void run_gets(Rank* self) {
  enum { kGets = 8, kBytes = 1000 };
  int next = (self->rank + 1) % self->num_ranks;
  for (int i = 0; i < kGets; i++) fill(self->window + i * kBytes, kBytes, self->rank, 0, 0, (uint64_t)i);
  meet(self);
  for (int round = 0; round < self->num_rounds; round++) {
    void* requests[kGets];
    memset(self->source, 0, kGets * kBytes);
    for (int i = 0; i < kGets; i++) {
      requests[i] = get(self, round % kNumContexts, next, (size_t)i * kBytes, (size_t)i * kBytes, kBytes);
    }
    finish(self, flush(self, round % kNumContexts, next));
    for (int i = 0; i < kGets; i++) check(self->source + i * kBytes, kBytes, next, 0, 0, (uint64_t)i);
    for (int i = 0; i < kGets; i++) finish(self, requests[i]);
  }
  meet(self);
}

// Many puts to all ranks at once, in random order, on random contexts. Some bear a weak signal of their own; one strong
// signal a context closes the round. Sources are overwritten as soon as they may be.
void run_random(Rank* self) {
  uint64_t random = self->seed * 1000 + (uint64_t)self->rank;
  size_t region_bytes = self->window_bytes / (size_t)self->num_ranks;
  size_t piece_bytes = region_bytes / kPieces;
  for (int round = 0; round < self->num_rounds; round++) {
    // The same for both ends.
    uint64_t plan_seed = self->seed * 7919 + (uint64_t)round;
    static void* requests[kMaxRanks][kPieces];
    static void* closes[kMaxRanks][kNumContexts];
    int first = (int)(next_random(&random) % kPieces);
    for (int i = 0; i < kPieces; i++) {
      int piece = (first + 7 * i) % kPieces;
      for (int peer = 0; peer < self->num_ranks; peer++) {
        uint64_t plan = plan_seed ^ ((uint64_t)self->rank << 40) ^ ((uint64_t)peer << 32) ^ (uint64_t)piece;
        size_t bytes = next_random(&plan) % (piece_bytes + 1);
        int context = (int)(next_random(&plan) % kNumContexts);
        bool is_weak = next_random(&plan) % 2 == 0;
        size_t from = (size_t)peer * region_bytes + (size_t)piece * piece_bytes;
        size_t to = (size_t)self->rank * region_bytes + (size_t)piece * piece_bytes;
        fill(self->source + from, bytes, self->rank, peer, (uint64_t)round, (uint64_t)piece);
        int signal = is_weak ? 256 + self->rank * kPieces + piece : -1;
        requests[peer][piece] = put(self, context, peer, from, to, bytes, signal, 5, false);
      }
    }
    for (int peer = 0; peer < self->num_ranks; peer++) {
      for (int context = 0; context < kNumContexts; context++) {
        closes[peer][context] = put(self, context, peer, 0, 0, 0, self->rank * kNumContexts + context, 1, true);
      }
    }
    for (int peer = 0; peer < self->num_ranks; peer++) {
      for (int piece = 0; piece < kPieces; piece++) {
        finish(self, requests[peer][piece]);
        memset(self->source + (size_t)peer * region_bytes + (size_t)piece * piece_bytes, 0xee, piece_bytes);
      }
      for (int context = 0; context < kNumContexts; context++) finish(self, closes[peer][context]);
    }
    // Weak signals first, then what the strong ones promise: all pieces of their context.
    for (int is_strong = 0; is_strong < 2; is_strong++) {
      for (int peer = 0; peer < self->num_ranks; peer++) {
        for (int piece = 0; piece < kPieces; piece++) {
          uint64_t plan = plan_seed ^ ((uint64_t)peer << 40) ^ ((uint64_t)self->rank << 32) ^ (uint64_t)piece;
          size_t bytes = next_random(&plan) % (piece_bytes + 1);
          int context = (int)(next_random(&plan) % kNumContexts);
          bool is_weak = next_random(&plan) % 2 == 0;
          if (is_weak == (is_strong != 0)) continue;
          int signal = 256 + peer * kPieces + piece;
          static uint64_t expected[kMaxRanks * kPieces];
          if (is_weak) {
            wait_signal(self, signal, expected[signal - 256] += 5);
          } else {
            wait_signal(self, peer * kNumContexts + context, (uint64_t)round + 1);
          }
          check(self->window + (size_t)peer * region_bytes + (size_t)piece * piece_bytes, bytes, peer, self->rank,
                (uint64_t)round, (uint64_t)piece);
        }
      }
    }
    meet(self);
  }
}

// With a delay, puts are done with their sources long before their data arrives. Two rounds need more places to keep
// messages in than there are, unless the first round's are given back.
void run_early(Rank* self) {
  enum { kPuts = 100, kBytes = 64 };
  for (int round = 1; round <= self->num_rounds; round++) {
    double start_s = now_s();
    void* requests[kPuts];
    memset(self->source, 10 * round + 1, kBytes);
    for (int i = 0; i < kPuts; i++) {
      requests[i] = put(self, 0, self->rank, 0, (size_t)i * kBytes, kBytes, 0, 1, true);
    }
    for (int i = 0; i < kPuts; i++) finish(self, requests[i]);
    CHECK(self->window[0] != 10 * round + 1 && read_signal(self, 0) == (uint64_t)(round - 1) * kPuts,
          "the data is there %g s after the put", now_s() - start_s);
    memset(self->source, 10 * round + 2, kBytes);
    wait_signal(self, 0, (uint64_t)round * kPuts);
    CHECK(now_s() - start_s >= 1.0, "it took %g s", now_s() - start_s);
    for (int i = 0; i < kPuts * kBytes; i++) {
      CHECK(self->window[i] == 10 * round + 1, "the source was read late: %d", self->window[i]);
    }
  }
}

// The last rank falls silent after some messages. The others still reach each other, and not it.
void run_silent(Rank* self) {
  int lost = self->num_ranks - 1;
  int num_before = self->num_rounds;
  if (self->rank == lost) {
    for (int i = 0; i < num_before; i++) finish(self, put(self, 0, 0, 0, 0, 8, 0, 1, true));
    void* request = put(self, 0, 0, 0, 0, 8, 0, 1, true);
    for (int i = 0; i < 100; i++) {
      CHECK(!is_done(self, request), "a message of the silent rank is done");
      usleep(1000);
    }
  } else {
    if (self->rank == 0) wait_signal(self, 0, (uint64_t)num_before);
    usleep(200000);
    void* request = put(self, 0, lost, 0, 64, 8, 1, 1, true);
    int next = (self->rank + 1) % lost;
    finish(self, put(self, 0, next, 0, 128, 8, 2, 1, true));
    wait_signal(self, 2, 1);
    CHECK(!is_done(self, request), "a message to the silent rank is done");
    if (self->rank == 0) CHECK(read_signal(self, 0) == (uint64_t)num_before, "the silent rank still speaks");
  }
}

// The last rank is killed. The others still reach each other, and can end.
void run_dead(Rank* self) {
  int lost = self->num_ranks - 1;
  if (self->rank == lost) {
    finish(self, put(self, 0, 0, 0, 0, 8, 0, 1, true));
    wait_signal(self, 3, (uint64_t)lost);
    raise(SIGKILL);
  }
  if (self->rank == 0) wait_signal(self, 0, 1);
  finish(self, put(self, 0, lost, 0, 64, 8, 3, 1, true));
  // Until the process is gone and this has been seen, a put may still seem to arrive.
  void* request = NULL;
  for (int i = 0; i < 200; i++) {
    request = put(self, 0, lost, 0, 64, 8, -1, 0, false);
    usleep(50000);
    if (!is_done(self, request)) break;
    CHECK(i < 199, "messages to a dead rank are done");
  }
  int next = (self->rank + 1) % lost;
  finish(self, put(self, 1, next, 0, 128, 8, 2, 1, true));
  wait_signal(self, 2, 1);
  CHECK(!is_done(self, request), "a message to a dead rank is done");
}

// Known numbers of everything, for the counters.
void run_counted(Rank* self) {
  for (int peer = 0; peer < self->num_ranks; peer++) {
    for (int i = 0; i < 3 + peer; i++) finish(self, put(self, 0, peer, 0, 0, 100, -1, 0, false));
    for (int i = 0; i < 2; i++) finish(self, put(self, 1, peer, 0, 0, 8, 7, 1, true));
    finish(self, get(self, 2, peer, 0, 0, 4096));
    finish(self, flush(self, 2, peer));
  }
  meet(self);
}

// What is not valid is refused, and does no harm.
void run_misuse(Rank* self) {
  const NcclRmaPluginV16* plugin = self->plugin;
  size_t bytes = self->window_bytes;
  void *window = self->window_memory, *source = self->source_memory, *signals = self->signal_memory;
  void* request = NULL;
  CHECK(plugin->put(self->context, 0, 0, source, bytes + 1, 0, window, 0, 0, &request) != kNcclSuccess, "too long");
  CHECK(plugin->put(self->context, 0, 0, source, 8, bytes - 4, window, 0, 0, &request) != kNcclSuccess, "past the end");
  CHECK(plugin->put(self->context, 0, UINT64_MAX - 3, source, 8, 0, window, 0, 0, &request) != kNcclSuccess, "wraps");
  CHECK(plugin->put(self->context, kNumContexts, 0, source, 8, 0, window, 0, 0, &request) != kNcclSuccess, "context");
  CHECK(plugin->put(self->context, 0, 0, source, 8, 0, window, 99, 0, &request) != kNcclSuccess, "rank");
  CHECK(plugin->put_signal(self->context, 0, 0, NULL, 0, 0, NULL, 0, 4, signals, 1, kNcclSignalAdd, true, 0,
                           &request) != kNcclSuccess,
        "a signal that is not aligned");
  CHECK(plugin->put_signal(self->context, 0, 0, NULL, 0, 0, NULL, 0, 8, signals, 1, 3, true, 0, &request) !=
            kNcclSuccess,
        "an operation that there is not");
  if (self->kind == kNcclPointerCuda) {
    // The signals have no handle that exports, so no peer can write there.
    uint32_t peer = (uint32_t)((self->rank + 1) % self->num_ranks);
    CHECK(plugin->put(self->context, 0, 0, source, 8, 0, signals, peer, 0, &request) != kNcclSuccess, "no handle");
  }
  bool has_error = true;
  CHECK(plugin->query_last_error(self->context, &has_error) == kNcclSuccess && !has_error, "an error is left");
  meet(self);
}

// Rank 0 sees puts of rank 1 overtake each other at least once, and never a strong signal overtake data.
void run_reordered(Rank* self) {
  enum { kMessages = 16 };
  int num_overtaken = 0;
  for (int round = 0; round < self->num_rounds; round++) {
    if (self->rank == 1) {
      void* requests[kMessages];
      for (int i = 0; i < kMessages; i++) {
        self->source[64 * i] = (char)(round + 1);
        requests[i] = put(self, 0, 0, 64 * (size_t)i, 64 * (size_t)i, 1, i, 1, false);
      }
      for (int i = 0; i < kMessages; i++) finish(self, requests[i]);
    } else if (self->rank == 0) {
      bool is_complete = false;
      while (!is_complete) {
        // From the last to the first, so that arrival in order never looks like overtaking.
        bool has_later = false;
        is_complete = true;
        for (int i = kMessages - 1; i >= 0; i--) {
          bool is_here = read_signal(self, i) >= (uint64_t)round + 1;
          num_overtaken += has_later && !is_here;
          has_later |= is_here;
          is_complete &= is_here;
          if (is_here) CHECK(self->window[64 * i] == (char)(round + 1), "a weak signal came before its data");
        }
      }
    }
    meet(self);
  }
  if (self->rank == 0) printf("overtaken %d\n", num_overtaken);
}
