#include "faults.h"

#include <errno.h>
#include <stdlib.h>

#include "log.h"

// Reordering needs some time in which messages can overtake each other; used where no delay is set.
static const uint64_t kReorderWindowNs = 50000;

static bool read_number(const char* name, bool* is_set, uint64_t* number) {
  const char* text = getenv(name);
  *is_set = text != NULL && text[0] != '\0';
  if (!*is_set) return true;
  char* end;
  errno = 0;
  *number = strtoull(text, &end, 10);
  if (errno == 0 && *end == '\0' && text[0] != '-') return true;
  LOOPBACK_WARN("%s must be a whole number of at least 0 (got '%s')", name, text);
  return false;
}

bool faults_read(int rank, Faults* faults) {
  bool has_delay, has_seed, has_silent, has_after;
  uint64_t delay_us = 0, seed = 0, silent_rank = 0, silent_after = 0;
  if (!read_number("EP_LOOPBACK_DELAY_US", &has_delay, &delay_us) ||
      !read_number("EP_LOOPBACK_REORDER", &has_seed, &seed) ||
      !read_number("EP_LOOPBACK_DROP_RANK", &has_silent, &silent_rank) ||
      !read_number("EP_LOOPBACK_DROP_AFTER", &has_after, &silent_after)) {
    return false;
  }
  *faults = (Faults){
      .delay_ns = delay_us * 1000,
      .has_reordering = has_seed,
      // Ranks differ; the state of the generator must not be 0.
      .random = ((seed + 1) * 0x9e3779b97f4a7c15u) ^ ((uint64_t)(rank + 1) * 0xbf58476d1ce4e5b9u),
      .silent_rank = has_silent ? (int)silent_rank : -1,
      .silent_after = silent_after,
  };
  if (faults->random == 0) faults->random = 1;
  return true;
}

bool faults_hold_messages(const Faults* faults) { return faults->delay_ns != 0 || faults->has_reordering; }

uint64_t faults_next_delay_ns(Faults* faults) {
  if (!faults->has_reordering) return faults->delay_ns;
  // xorshift64 (Marsaglia, "Xorshift RNGs", 2003).
  faults->random ^= faults->random << 13;
  faults->random ^= faults->random >> 7;
  faults->random ^= faults->random << 17;
  return faults->random % ((faults->delay_ns != 0 ? faults->delay_ns : kReorderWindowNs) + 1);
}
