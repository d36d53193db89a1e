// Plays NCCL for the loopback plugin: starts ranks as processes, connects them, runs a scenario, tears down.
// usage: driver PLUGIN SCENARIO NUM_RANKS SEED NUM_ROUNDS host|cuda WINDOW_BYTES
#define _GNU_SOURCE
#include "driver.h"

#include <dlfcn.h>
#include <sched.h>
#include <stdarg.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

// What bootstrap does in NCCL.
typedef struct {
  char handles[kMaxRanks][kNcclHandleBytes];
  int num_arrived;
} Bootstrap;

static void log_line(int level, unsigned long subsystems, const char* file, int line, const char* format, ...) {
  (void)level, (void)subsystems;
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "[%d] %s:%d ", (int)getpid(), strrchr(file, '/') ? strrchr(file, '/') + 1 : file, line);
  vfprintf(stderr, format, arguments);
  fprintf(stderr, "\n");
  va_end(arguments);
}

double now_s(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

uint64_t next_random(uint64_t* state) {
  *state += 0x9e3779b97f4a7c15u;
  uint64_t mixed = (*state ^ (*state >> 30)) * 0xbf58476d1ce4e5b9u;
  mixed = (mixed ^ (mixed >> 27)) * 0x94d049bb133111ebu;
  return mixed ^ (mixed >> 31);
}

bool is_done(Rank* self, void* request) {
  int done = 0;
  NcclResult result = self->plugin->test(self->comm, request, &done);
  CHECK(result == kNcclSuccess, "rank %d: test gives %d", self->rank, result);
  return done != 0;
}

void finish(Rank* self, void* request) {
  while (!is_done(self, request)) sched_yield();
}

void* put(Rank* self, int context, int peer, size_t from, size_t to, size_t bytes, int signal, uint64_t value,
          bool is_strong) {
  void* request = NULL;
  void* source = bytes != 0 ? self->source_memory : NULL;
  void* destination = bytes != 0 ? self->window_memory : NULL;
  NcclResult result =
      signal < 0 ? self->plugin->put(self->context, context, from, source, bytes, to, destination, (uint32_t)peer, 0,
                                     &request)
                 : self->plugin->put_signal(self->context, context, from, source, bytes, to, destination,
                                            (uint32_t)peer, 8 * (uint64_t)signal, self->signal_memory, value,
                                            value == 1 ? kNcclSignalIncrement : kNcclSignalAdd, is_strong, 0, &request);
  CHECK(result == kNcclSuccess && request != NULL, "rank %d: put gives %d", self->rank, result);
  return request;
}

void* get(Rank* self, int context, int peer, size_t from, size_t to, size_t bytes) {
  void* request = NULL;
  NcclResult result = self->plugin->get(self->context, context, from, self->window_memory, bytes, to,
                                        self->source_memory, (uint32_t)peer, 0, &request);
  CHECK(result == kNcclSuccess && request != NULL, "rank %d: get gives %d", self->rank, result);
  return request;
}

void* flush(Rank* self, int context, int peer) {
  void* request = NULL;
  NcclResult result = self->plugin->flush(self->context, context, self->signal_memory, (uint32_t)peer, &request);
  CHECK(result == kNcclSuccess && request != NULL, "rank %d: flush gives %d", self->rank, result);
  return request;
}

uint64_t read_signal(Rank* self, int signal) { return __atomic_load_n(&self->signals[signal], __ATOMIC_ACQUIRE); }

void wait_signal(Rank* self, int signal, uint64_t least) {
  while (read_signal(self, signal) < least) sched_yield();
}

void meet(Rank* self) {
  static uint64_t num_meetings;
  num_meetings++;
  for (int peer = 0; peer < self->num_ranks; peer++) {
    finish(self, put(self, 0, peer, 0, 0, 0, kNumSignals - kMaxRanks + self->rank, 1, true));
  }
  for (int peer = 0; peer < self->num_ranks; peer++) wait_signal(self, kNumSignals - kMaxRanks + peer, num_meetings);
}

static void* allocate(Rank* self, size_t bytes, bool has_handle) {
  if (self->kind == kNcclPointerHost) {
    void* address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return address == MAP_FAILED ? NULL : address;
  }
  void* (*fake_cuda_allocate)(size_t, bool) = NULL;
  *(void**)&fake_cuda_allocate = dlsym(RTLD_DEFAULT, "fake_cuda_allocate");
  CHECK(fake_cuda_allocate != NULL, "no fake CUDA is loaded");
  return fake_cuda_allocate(bytes, has_handle);
}

static void* register_memory(Rank* self, void* address, size_t bytes) {
  void* memory = NULL;
  NcclResult result = self->plugin->register_memory(self->comm, address, bytes, self->kind, 0, &memory);
  CHECK(result == kNcclSuccess, "rank %d: registration gives %d", self->rank, result);
  return memory;
}

static void arrive(Rank* self, Bootstrap* bootstrap, int num_times) {
  __atomic_fetch_add(&bootstrap->num_arrived, 1, __ATOMIC_SEQ_CST);
  while (__atomic_load_n(&bootstrap->num_arrived, __ATOMIC_SEQ_CST) < num_times * self->num_ranks) usleep(1000);
}

static void connect_ranks(Rank* self, Bootstrap* bootstrap) {
  void *instance = NULL, *listener = NULL;
  int num_devices = 0;
  void* handles[kMaxRanks];
  CHECK(self->plugin->init(&instance, 7, log_line) == kNcclSuccess, "init");
  CHECK(self->plugin->devices(&num_devices) == kNcclSuccess && num_devices == 1, "devices");
  CHECK(self->plugin->listen(instance, 0, bootstrap->handles[self->rank], &listener) == kNcclSuccess, "listen");
  arrive(self, bootstrap, 1);
  for (int peer = 0; peer < self->num_ranks; peer++) handles[peer] = bootstrap->handles[peer];
  NcclResult result = self->plugin->connect(instance, handles, self->num_ranks, self->rank, listener, &self->comm);
  CHECK(result == kNcclSuccess, "rank %d: connect gives %d", self->rank, result);
  CHECK(self->plugin->close_listener(listener) == kNcclSuccess, "close_listener");
  NcclRmaConfig config[4] = {{.num_contexts = kNumContexts}};
  CHECK(self->plugin->create_context(self->comm, config, &self->context) == kNcclSuccess, "create_context");
}

static void tear_down(Rank* self) {
  CHECK(self->plugin->destroy_context(self->context) == kNcclSuccess, "destroy_context");
  void* memories[] = {self->window_memory, self->source_memory, self->signal_memory};
  for (int i = 0; i < 3; i++) {
    CHECK(self->plugin->deregister_memory(self->comm, memories[i]) == kNcclSuccess, "deregister_memory");
  }
  CHECK(self->plugin->close_comm(self->comm) == kNcclSuccess, "close_comm");
  CHECK(self->plugin->finalize(NULL) == kNcclSuccess, "finalize");
  int (*num_live_mappings)(void) = NULL;
  *(void**)&num_live_mappings = dlsym(RTLD_DEFAULT, "fake_cuda_num_live_mappings");
  if (num_live_mappings != NULL) CHECK(num_live_mappings() == 0, "%d mappings are left", num_live_mappings());
  int (*num_live_contexts)(void) = NULL;
  *(void**)&num_live_contexts = dlsym(RTLD_DEFAULT, "fake_cuda_num_live_contexts");
  if (num_live_contexts != NULL) CHECK(num_live_contexts() == 0, "%d contexts are left", num_live_contexts());
}

static int run_rank(Rank* self, Bootstrap* bootstrap, Scenario* scenario) {
  if (self->kind == kNcclPointerCuda) {
    int (*set_current)(void*) = NULL;
    CHECK(dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) != NULL, "%s", dlerror());
    *(void**)&set_current = dlsym(RTLD_DEFAULT, "cuCtxSetCurrent");
    // Memory that is all zero serves as the application's context.
    static uint64_t application[8];
    set_current(application);
  }
  connect_ranks(self, bootstrap);
  self->window = allocate(self, self->window_bytes, true);
  self->source = allocate(self, self->window_bytes, true);
  self->signals = allocate(self, kNumSignals * sizeof(uint64_t), false);
  self->window_memory = register_memory(self, self->window, self->window_bytes);
  self->source_memory = register_memory(self, self->source, self->window_bytes);
  self->signal_memory = register_memory(self, self->signals, kNumSignals * sizeof(uint64_t));
  scenario(self);
  tear_down(self);
  return 0;
}

int main(int num_arguments, char** arguments) {
  static const struct {
    const char* name;
    Scenario* run;
  } kScenarios[] = {{"sizes", run_sizes}, {"gets", run_gets},       {"random", run_random},
                    {"early", run_early}, {"silent", run_silent},   {"dead", run_dead},
                    {"counted", run_counted}, {"misuse", run_misuse}, {"reordered", run_reordered}};
  CHECK(num_arguments == 8, "got %d arguments", num_arguments);
  Scenario* scenario = NULL;
  for (size_t i = 0; i < sizeof kScenarios / sizeof kScenarios[0]; i++) {
    if (strcmp(arguments[2], kScenarios[i].name) == 0) scenario = kScenarios[i].run;
  }
  CHECK(scenario != NULL, "no scenario %s", arguments[2]);
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  CHECK(library != NULL, "%s", dlerror());
  Bootstrap* bootstrap = mmap(NULL, sizeof *bootstrap, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Rank self = {
      .num_ranks = atoi(arguments[3]),
      .seed = strtoull(arguments[4], NULL, 10),
      .num_rounds = atoi(arguments[5]),
      .kind = strcmp(arguments[6], "cuda") == 0 ? kNcclPointerCuda : kNcclPointerHost,
      .window_bytes = strtoull(arguments[7], NULL, 10),
      .plugin = dlsym(library, "ncclRmaPlugin_v16"),
  };
  CHECK(self.plugin != NULL && self.num_ranks <= kMaxRanks, "usage");
  pid_t pids[kMaxRanks];
  for (int rank = 0; rank < self.num_ranks; rank++) {
    pids[rank] = fork();
    if (pids[rank] == 0) {
      self.rank = rank;
      exit(run_rank(&self, bootstrap, scenario));
    }
  }
  int num_failures = 0;
  for (int rank = 0; rank < self.num_ranks; rank++) {
    int status = 0;
    waitpid(pids[rank], &status, 0);
    bool is_well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    bool is_meant_to_die = scenario == run_dead && rank == self.num_ranks - 1;
    if (!is_well && !is_meant_to_die) {
      fprintf(stderr, "rank %d ended with status %d\n", rank, status);
      num_failures++;
    }
  }
  return num_failures == 0 ? 0 : 1;
}
