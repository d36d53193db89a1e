// Stands in for libcuda.so.1 on a machine without a GPU: "device memory" is memory of the host, allocations that export
// are anonymous files, and copies of a stream are done late, a few at each look at an event.
#define _GNU_SOURCE
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kOk = 0, kInvalidValue = 1, kNoContext = 201, kNotReady = 600, kMaxAllocations = 256, kStepsPerLook = 2 };

typedef struct {
  void* address;  // where the application has it mapped; NULL for imports
  size_t bytes;
  int fd;  // -1 for memory without a handle
  int num_handles;
} Allocation;

typedef struct Step Step;
struct Step {
  Step* next;
  void* to;
  const void* from;
  size_t bytes;
  uint64_t* event;  // set to 1 instead of a copy, if not NULL
};

typedef struct {
  Step* first;
  Step** end;
} Stream;

// An application's context is any pointer; those that are made here remember what they were put above.
typedef struct {
  bool is_made_here;
  void* below;
} Context;

static _Thread_local void* current;
static int num_live_contexts;
static Allocation allocations[kMaxAllocations];
static int num_allocations;
static int num_live_mappings;

// ---- For the test's driver

void* fake_cuda_allocate(size_t bytes, bool has_handle) {
  int fd = has_handle ? memfd_create("fake_cuda", MFD_CLOEXEC) : -1;
  if (has_handle && ftruncate(fd, (off_t)bytes) != 0) return NULL;
  int flags = has_handle ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  void* address = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
  allocations[num_allocations++] = (Allocation){.address = address, .bytes = bytes, .fd = fd};
  return address;
}

int fake_cuda_num_live_mappings(void) { return num_live_mappings; }

int fake_cuda_num_live_contexts(void) { return num_live_contexts; }

// ---- The driver's interface

int cuCtxCreate_v2(void** context, unsigned flags, int device) {
  if (flags != 0 || device != 0) return kInvalidValue;
  Context* made = malloc(sizeof *made);
  *made = (Context){.is_made_here = true, .below = current};
  *context = current = made;
  num_live_contexts++;
  return kOk;
}

int cuCtxPopCurrent_v2(void** context) {
  *context = current;
  if (current == NULL || !((Context*)current)->is_made_here) return kInvalidValue;
  current = ((Context*)current)->below;
  return kOk;
}

int cuCtxDestroy_v2(void* context) {
  free(context);
  num_live_contexts--;
  return kOk;
}

int cuCtxGetCurrent(void** context) {
  *context = current;
  return kOk;
}

int cuCtxSetCurrent(void* context) {
  current = context;
  return kOk;
}

int cuCtxGetDevice(int* device) {
  *device = 0;
  return current != NULL ? kOk : kNoContext;
}

int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return current != NULL ? kOk : kNoContext;
}

int cuGetErrorName(int result, const char** name) {
  *name = result == kNoContext ? "NO_CONTEXT" : "ERROR";
  return kOk;
}

static Allocation* find(const void* address) {
  for (int i = 0; i < num_allocations; i++) {
    const char* base = allocations[i].address;
    if (base != NULL && (const char*)address >= base && (const char*)address < base + allocations[i].bytes) {
      return &allocations[i];
    }
  }
  return NULL;
}

int cuMemRetainAllocationHandle(uint64_t* handle, void* address) {
  Allocation* allocation = find(address);
  if (current == NULL) return kNoContext;
  if (allocation == NULL || allocation->fd < 0) return kInvalidValue;
  allocation->num_handles++;
  *handle = (uint64_t)(allocation - allocations);
  return kOk;
}

int cuMemRelease(uint64_t handle) {
  allocations[handle].num_handles--;
  return allocations[handle].num_handles >= 0 ? kOk : kInvalidValue;
}

int cuMemGetAddressRange_v2(uint64_t* base, size_t* bytes, uint64_t pointer) {
  Allocation* allocation = find((void*)pointer);
  if (allocation == NULL) return kInvalidValue;
  *base = (uint64_t)allocation->address;
  *bytes = allocation->bytes;
  return kOk;
}

int cuMemExportToShareableHandle(void* shareable, uint64_t handle, int type, unsigned long long flags) {
  if (type != 1 || flags != 0) return kInvalidValue;
  int fd = dup(allocations[handle].fd);
  memcpy(shareable, &fd, sizeof fd);
  return fd >= 0 ? kOk : kInvalidValue;
}

int cuMemImportFromShareableHandle(uint64_t* handle, void* shareable, int type) {
  if (current == NULL) return kNoContext;
  int fd = type == 1 ? dup((int)(intptr_t)shareable) : -1;
  if (fd < 0 || num_allocations == kMaxAllocations) return kInvalidValue;
  *handle = (uint64_t)num_allocations;
  allocations[num_allocations++] = (Allocation){.fd = fd, .num_handles = 1};
  return kOk;
}

int cuMemAddressReserve(uint64_t* pointer, size_t bytes, size_t alignment, uint64_t wanted, unsigned long long flags) {
  (void)alignment, (void)wanted, (void)flags;
  void* address = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *pointer = (uint64_t)address;
  return address != MAP_FAILED ? kOk : kInvalidValue;
}

int cuMemAddressFree(uint64_t pointer, size_t bytes) {
  return munmap((void*)pointer, bytes) == 0 ? kOk : kInvalidValue;
}

int cuMemMap(uint64_t pointer, size_t bytes, size_t offset, uint64_t handle, unsigned long long flags) {
  (void)flags;
  void* wanted = (void*)pointer;
  num_live_mappings++;
  return mmap(wanted, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, allocations[handle].fd, (off_t)offset) == wanted
             ? kOk
             : kInvalidValue;
}

int cuMemUnmap(uint64_t pointer, size_t bytes) {
  num_live_mappings--;
  void* wanted = (void*)pointer;
  return mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == wanted ? kOk : kInvalidValue;
}

int cuMemSetAccess(uint64_t pointer, size_t bytes, const void* access, size_t num_accesses) {
  (void)access;
  return num_accesses == 1 && mprotect((void*)pointer, bytes, PROT_READ | PROT_WRITE) == 0 ? kOk : kInvalidValue;
}

int cuMemAlloc_v2(uint64_t* pointer, size_t bytes) {
  *pointer = (uint64_t)malloc(bytes);
  return current != NULL && *pointer != 0 ? kOk : kNoContext;
}

int cuMemFree_v2(uint64_t pointer) {
  free((void*)pointer);
  return kOk;
}

int cuStreamCreateWithPriority(void** stream, unsigned flags, int priority) {
  (void)priority;
  // What is held up in the application's context must not hold up the network.
  if (current == NULL || !((Context*)current)->is_made_here || flags != 1) return kNoContext;
  Stream* made = calloc(1, sizeof *made);
  made->end = &made->first;
  *stream = made;
  return kOk;
}

static int append(Stream* stream, Step step) {
  if (current == NULL) return kNoContext;
  Step* made = malloc(sizeof *made);
  *made = step;
  made->next = NULL;
  *stream->end = made;
  stream->end = &made->next;
  return kOk;
}

static void run(Stream* stream, int num_steps) {
  for (; num_steps != 0 && stream->first != NULL; num_steps--) {
    Step* step = stream->first;
    if (step->event != NULL) {
      *step->event -= 1;
    } else {
      memmove(step->to, step->from, step->bytes);
    }
    stream->first = step->next;
    if (stream->first == NULL) stream->end = &stream->first;
    free(step);
  }
}

int cuStreamSynchronize(void* stream) {
  run(stream, -1);
  return kOk;
}

int cuStreamDestroy_v2(void* stream) {
  run(stream, -1);
  free(stream);
  return kOk;
}

// An event counts the records that did not run yet, and remembers the stream of the last.
typedef struct {
  uint64_t num_open;
  Stream* stream;
} Event;

int cuEventCreate(void** event, unsigned flags) {
  (void)flags;
  *event = calloc(1, sizeof(Event));
  return current != NULL ? kOk : kNoContext;
}

int cuEventRecord(void* event, void* stream) {
  Event* recorded = event;
  recorded->num_open++;
  recorded->stream = stream;
  return append(stream, (Step){.event = &recorded->num_open});
}

int cuEventQuery(void* event) {
  Event* asked = event;
  if (current == NULL) return kNoContext;
  if (asked->stream != NULL) run(asked->stream, kStepsPerLook);
  return asked->num_open == 0 ? kOk : kNotReady;
}

int cuEventDestroy_v2(void* event) {
  Event* last = event;
  if (last->num_open != 0) run(last->stream, -1);
  free(event);
  return kOk;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  return append(stream, (Step){.to = (void*)to, .from = (const void*)from, .bytes = bytes});
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void* from, size_t bytes, void* stream) {
  return append(stream, (Step){.to = (void*)to, .from = from, .bytes = bytes});
}

int cuMemcpyDtoHAsync_v2(void* to, uint64_t from, size_t bytes, void* stream) {
  return append(stream, (Step){.to = to, .from = (const void*)from, .bytes = bytes});
}

int cuMemcpyBatchAsync_v2(uint64_t* to, uint64_t* from, size_t* bytes, size_t num_copies, void* attributes,
                          size_t* attribute_starts, size_t num_attributes, void* stream) {
  (void)attributes;
  if (getenv("FAKE_CUDA_REFUSES_BATCHES") != NULL) return kInvalidValue;
  if (num_attributes != 1 || attribute_starts[0] != 0) return kInvalidValue;
  for (size_t i = 0; i < num_copies; i++) {
    int result = cuMemcpyDtoDAsync_v2(to[i], from[i], bytes[i], stream);
    if (result != kOk) return result;
  }
  return kOk;
}

int cuModuleLoadData(void** module, const void* image) {
  *module = (void*)image;
  return current != NULL && strstr(image, ".entry deep_ep_loopback_add(") != NULL ? kOk : kInvalidValue;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = module;
  return strcmp(name, "deep_ep_loopback_add") == 0 ? kOk : kInvalidValue;
}

int cuModuleUnload(void* module) {
  (void)module;
  return kOk;
}

// There is one kernel: thread i adds the second word of pair i to where the first points.
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters,
                   void** extra) {
  (void)function, (void)grid_x, (void)grid_y, (void)grid_z, (void)block_y, (void)block_z, (void)shared_bytes;
  (void)stream, (void)extra;
  if (current == NULL) return kNoContext;
  uint64_t(*pairs)[2] = parameters[0];
  for (unsigned i = 0; i < block_x; i++) {
    __atomic_fetch_add((uint64_t*)pairs[i][0], pairs[i][1], __ATOMIC_ACQ_REL);
  }
  return kOk;
}
