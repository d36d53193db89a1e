// Memory of GPUs: a peer's is mapped here through the POSIX descriptor that its allocation exports, and copies run on
// a stream of this layer. Kernels of the ranks may fill the GPU meanwhile, and wait for these very copies. So nothing
// here may need what a running kernel holds: all runs in a context of the plugin's own, copies are asked of the copy
// engines, and words are added to by a kernel of one warp on a stream of the highest priority.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cuda_context.h"
#include "cuda_driver.h"
#include "log.h"
#include "memory.h"
#include "process.h"

// Copies are cut into pieces of this size. 1 MiB copies ran beside waiting kernels where 16 MiB ones hung, when no copy
// engine was asked for (one H100, driver 580.159, 4 ranks under MPS, 2026-11-24).
static const size_t kPieceBytes = (size_t)1 << 20;
enum { kPiecesPerCall = 64, kNumEvents = 64 };

typedef struct {
  MemoryLayer layer;
  const CudaDriver* cuda;
  CudaContext application;
  CudaContext context;
  int device;
  CudaStream copy_stream;
  CudaStream add_stream;
  void* module;
  void* add_kernel;
  bool has_batches;
  CudaEvent events[kNumEvents];  // of marks, by mark modulo kNumEvents
  uint64_t num_marks;
  uint64_t num_reached;
} CudaLayer;

// One thread a word. The fence makes visible, to whoever sees the sum, what was placed before.
static const char kAddPtx[] =
    ".version 7.0\n"
    ".target sm_70\n"
    ".address_size 64\n"
    ".visible .entry deep_ep_loopback_add(.param .align 8 .b8 adds[256]) {\n"
    "  .reg .b32 %r<2>;\n"
    "  .reg .b64 %rd<6>;\n"
    "  mov.u32 %r1, %tid.x;\n"
    "  mul.wide.u32 %rd1, %r1, 16;\n"
    "  mov.u64 %rd2, adds;\n"
    "  add.u64 %rd3, %rd2, %rd1;\n"
    "  ld.param.u64 %rd4, [%rd3];\n"
    "  ld.param.u64 %rd5, [%rd3+8];\n"
    "  fence.acq_rel.sys;\n"
    "  red.relaxed.sys.global.add.u64 [%rd4], %rd5;\n"
    "  ret;\n"
    "}\n";

_Static_assert(sizeof(WordAdd) * kMaxWordAdds == 256, "the kernel's parameter must hold all words");

static bool is_ok(const CudaLayer* self, CudaResult result, const char* call) {
  if (result == kCudaSuccess) return true;
  const char* name = NULL;
  if (self->cuda->GetErrorName(result, &name) != kCudaSuccess || name == NULL) name = "an unknown error";
  LOOPBACK_WARN("%s failed with %s (%d)", call, name, result);
  return false;
}

#define CUDA_OK(self, call, ...) is_ok(self, (self)->cuda->call(__VA_ARGS__), "cu" #call)

// Makes a context current; returns the calling thread's, to be put back. Registration runs on NCCL's threads.
static CudaContext enter(const CudaLayer* self, CudaContext context) {
  CudaContext previous = NULL;
  (void)self->cuda->CtxGetCurrent(&previous);
  if (previous != context) (void)self->cuda->CtxSetCurrent(context);
  return previous;
}

static CudaContext enter_context(const CudaLayer* self) { return enter(self, self->context); }

static void leave_context(const CudaLayer* self, CudaContext previous) { (void)self->cuda->CtxSetCurrent(previous); }

static void cuda_share(MemoryLayer* layer, void* address, size_t bytes, MemoryShare* share) {
  CudaLayer* self = (CudaLayer*)layer;
  // Where the memory was allocated.
  CudaContext previous = enter(self, self->application);
  *share = (MemoryShare){.fd = -1};
  CudaHandle handle;
  // NCCL's signals have no handle that exports, and host memory mapped to the GPU has none at all. Their owner alone
  // writes them, so a failure is an answer here.
  if (self->cuda->MemRetainAllocationHandle(&handle, address) == kCudaSuccess) {
    CudaPointer base = 0;
    size_t base_bytes = 0;
    int fd = -1;
    CudaPointer pointer = (CudaPointer)address;
    if (self->cuda->MemGetAddressRange(&base, &base_bytes, pointer) == kCudaSuccess &&
        pointer - base + bytes <= base_bytes &&
        self->cuda->MemExportToShareableHandle(&fd, handle, kCudaHandlePosixFd, 0) == kCudaSuccess) {
      *share = (MemoryShare){
          .kind = kMemoryCuda, .fd = fd, .address = pointer, .file_bytes = base_bytes, .offset_bytes = pointer - base};
    }
    (void)self->cuda->MemRelease(handle);
  }
  leave_context(self, previous);
}

static void cuda_unshare(MemoryLayer* layer, MemoryShare* share) {
  (void)layer;
  if (share->fd >= 0) close(share->fd);
}

static bool map_peer(CudaLayer* self, const MemoryShare* share, int fd, Place* place) {
  CudaHandle handle;
  if (!CUDA_OK(self, MemImportFromShareableHandle, &handle, (void*)(intptr_t)fd, kCudaHandlePosixFd)) return false;
  CudaPointer mapping = 0;
  bool is_mapped = false;
  if (CUDA_OK(self, MemAddressReserve, &mapping, share->file_bytes, 0, 0, 0)) {
    CudaAccess access = {.location = {kCudaLocationDevice, self->device}, .flags = kCudaAccessReadWrite};
    if (CUDA_OK(self, MemMap, mapping, share->file_bytes, 0, handle, 0)) {
      is_mapped = CUDA_OK(self, MemSetAccess, mapping, share->file_bytes, &access, 1);
      if (!is_mapped) (void)self->cuda->MemUnmap(mapping, share->file_bytes);
    }
    if (!is_mapped) (void)self->cuda->MemAddressFree(mapping, share->file_bytes);
  }
  // The mapping keeps the memory.
  (void)self->cuda->MemRelease(handle);
  if (is_mapped) {
    *place = (Place){.kind = kMemoryCuda,
                     .address = mapping + share->offset_bytes,
                     .mapping = mapping,
                     .mapping_bytes = share->file_bytes};
  }
  return is_mapped;
}

static bool cuda_attach(MemoryLayer* layer, const MemoryShare* share, int pid, int pidfd, Place* place) {
  CudaLayer* self = (CudaLayer*)layer;
  int fd = process_copy_fd(pidfd, share->fd);
  if (fd < 0) {
    LOOPBACK_WARN("pidfd_getfd from process %d: %s; ranks must be of one user, and allowed to trace each other", pid,
                  strerror(errno));
    return false;
  }
  CudaContext previous = enter_context(self);
  bool is_mapped = map_peer(self, share, fd, place);
  leave_context(self, previous);
  close(fd);
  return is_mapped;
}

static void cuda_detach(MemoryLayer* layer, Place* place) {
  CudaLayer* self = (CudaLayer*)layer;
  CudaContext previous = enter_context(self);
  (void)CUDA_OK(self, MemUnmap, place->mapping, place->mapping_bytes);
  (void)CUDA_OK(self, MemAddressFree, place->mapping, place->mapping_bytes);
  leave_context(self, previous);
}

static bool cuda_allocate(MemoryLayer* layer, size_t bytes, Place* place) {
  CudaLayer* self = (CudaLayer*)layer;
  CudaContext previous = enter_context(self);
  CudaPointer pointer = 0;
  bool is_allocated = CUDA_OK(self, MemAlloc, &pointer, bytes);
  if (is_allocated) *place = (Place){.kind = kMemoryCuda, .address = pointer, .mapping = pointer};
  leave_context(self, previous);
  return is_allocated;
}

static void cuda_free(MemoryLayer* layer, Place* place) {
  CudaLayer* self = (CudaLayer*)layer;
  CudaContext previous = enter_context(self);
  (void)CUDA_OK(self, MemFree, place->mapping);
  leave_context(self, previous);
}

static void cuda_enter(MemoryLayer* layer) { (void)enter_context((CudaLayer*)layer); }

static bool copy_on_engines(CudaLayer* self, CudaPointer to, CudaPointer from, size_t bytes) {
  CudaPointer tos[kPiecesPerCall], froms[kPiecesPerCall];
  size_t sizes[kPiecesPerCall];
  size_t first_with_attributes = 0;
  CudaCopyAttributes attributes = {.source_order = kCudaCopyInStreamOrder, .flags = kCudaCopyBesideKernels};
  for (size_t num_done = 0; num_done < bytes;) {
    size_t num_pieces = 0;
    for (; num_pieces < kPiecesPerCall && num_done < bytes; num_pieces++) {
      tos[num_pieces] = to + num_done;
      froms[num_pieces] = from + num_done;
      sizes[num_pieces] = bytes - num_done < kPieceBytes ? bytes - num_done : kPieceBytes;
      num_done += sizes[num_pieces];
    }
    CudaResult result = self->cuda->MemcpyBatchAsync(tos, froms, sizes, num_pieces, &attributes,
                                                     &first_with_attributes, 1, self->copy_stream);
    if (!is_ok(self, result, "cuMemcpyBatchAsync")) return false;
  }
  return true;
}

static bool copy_piece(CudaLayer* self, const Place* to, const Place* from, size_t offset, size_t bytes) {
  if (from->kind == kMemoryHost) {
    return CUDA_OK(self, MemcpyHtoDAsync, to->address + offset, (const void*)(from->address + offset), bytes,
                   self->copy_stream);
  }
  if (to->kind == kMemoryHost) {
    return CUDA_OK(self, MemcpyDtoHAsync, (void*)(to->address + offset), from->address + offset, bytes,
                   self->copy_stream);
  }
  return CUDA_OK(self, MemcpyDtoDAsync, to->address + offset, from->address + offset, bytes, self->copy_stream);
}

static CopyStart cuda_copy(MemoryLayer* layer, const Place* to, const Place* from, size_t bytes) {
  CudaLayer* self = (CudaLayer*)layer;
  if (to->pid != 0 || from->pid != 0) {
    LOOPBACK_WARN("no way between memory of a GPU and host memory of process %d", to->pid != 0 ? to->pid : from->pid);
    return kCopyFailed;
  }
  if (self->has_batches && to->kind == kMemoryCuda && from->kind == kMemoryCuda) {
    return copy_on_engines(self, to->address, from->address, bytes) ? kCopyStarted : kCopyFailed;
  }
  for (size_t offset = 0; offset < bytes; offset += kPieceBytes) {
    size_t piece = bytes - offset < kPieceBytes ? bytes - offset : kPieceBytes;
    if (!copy_piece(self, to, from, offset, piece)) return kCopyFailed;
  }
  return kCopyStarted;
}

// Moves num_reached up to the newest mark that is.
static bool update_reached(CudaLayer* self) {
  while (self->num_reached < self->num_marks) {
    CudaResult result = self->cuda->EventQuery(self->events[(self->num_reached + 1) % kNumEvents]);
    if (result == kCudaNotReady) return true;
    if (!is_ok(self, result, "cuEventQuery")) return false;
    self->num_reached++;
  }
  return true;
}

static uint64_t cuda_mark(MemoryLayer* layer) {
  CudaLayer* self = (CudaLayer*)layer;
  // All events are in use: the newest is recorded again, later, and so covers what it covered too.
  bool is_full = self->num_marks - self->num_reached == kNumEvents - 1;
  uint64_t mark = is_full ? self->num_marks : self->num_marks + 1;
  if (!CUDA_OK(self, EventRecord, self->events[mark % kNumEvents], self->copy_stream)) return 0;
  self->num_marks = mark;
  return mark;
}

static bool cuda_has_reached(MemoryLayer* layer, uint64_t mark, bool* has_failed) {
  CudaLayer* self = (CudaLayer*)layer;
  if (mark == 0) return false;
  if (mark > self->num_reached) *has_failed = !update_reached(self);
  return mark <= self->num_reached;
}

static bool cuda_add(MemoryLayer* layer, const WordAdd* adds, int num_adds) {
  CudaLayer* self = (CudaLayer*)layer;
  WordAdd parameter[kMaxWordAdds] = {{0}};
  memcpy(parameter, adds, sizeof *adds * (size_t)num_adds);
  void* parameters[] = {parameter};
  return CUDA_OK(self, LaunchKernel, self->add_kernel, 1, 1, 1, (unsigned)num_adds, 1, 1, 0, self->add_stream,
                 parameters, NULL);
}

static void cuda_close(MemoryLayer* layer) {
  CudaLayer* self = (CudaLayer*)layer;
  if (self->context == NULL) {
    free(self);
    return;
  }
  CudaContext previous = enter_context(self);
  for (int i = 0; i < kNumEvents; i++) {
    if (self->events[i] != NULL) (void)self->cuda->EventDestroy(self->events[i]);
  }
  if (self->copy_stream != NULL) (void)self->cuda->StreamDestroy(self->copy_stream);
  if (self->add_stream != NULL) (void)self->cuda->StreamDestroy(self->add_stream);
  if (self->module != NULL) (void)self->cuda->ModuleUnload(self->module);
  leave_context(self, previous);
  (void)is_ok(self, cuda_context_release(self->cuda, self->device), "giving a context back");
  free(self);
}

// Takes the context for the device of the caller's.
static bool acquire_context(CudaLayer* self) {
  return CUDA_OK(self, CtxGetDevice, &self->device) &&
         is_ok(self, cuda_context_acquire(self->cuda, self->device, &self->context), "making a context");
}

static bool create(CudaLayer* self) {
  int least = 0, greatest = 0;
  if (!CUDA_OK(self, CtxGetStreamPriorityRange, &least, &greatest) ||
      !CUDA_OK(self, StreamCreateWithPriority, &self->copy_stream, kCudaStreamNonBlocking, greatest) ||
      !CUDA_OK(self, StreamCreateWithPriority, &self->add_stream, kCudaStreamNonBlocking, greatest) ||
      !CUDA_OK(self, ModuleLoadData, &self->module, kAddPtx) ||
      !CUDA_OK(self, ModuleGetFunction, &self->add_kernel, self->module, "deep_ep_loopback_add")) {
    return false;
  }
  for (int i = 0; i < kNumEvents; i++) {
    if (!CUDA_OK(self, EventCreate, &self->events[i], kCudaEventNoTiming)) return false;
  }
  return true;
}

// Uses everything once while no kernel waits.
static bool warm_up(CudaLayer* self) {
  Place device, host = {.kind = kMemoryHost};
  uint64_t word = 0;
  host.address = (uint64_t)&word;
  if (!cuda_allocate(&self->layer, 2 * kPieceBytes, &device)) return false;
  Place half = device;
  half.address += kPieceBytes;
  self->has_batches = false;
  bool is_warm = cuda_copy(&self->layer, &half, &device, kPieceBytes) == kCopyStarted &&
                 cuda_copy(&self->layer, &device, &host, sizeof word) == kCopyStarted &&
                 cuda_copy(&self->layer, &host, &device, sizeof word) == kCopyStarted &&
                 CUDA_OK(self, StreamSynchronize, self->copy_stream);
  // A driver may know batches and refuse them.
  self->has_batches = self->cuda->MemcpyBatchAsync != NULL &&
                      copy_on_engines(self, half.address, device.address, kPieceBytes);
  WordAdd add = {.address = device.address, .value = 1};
  is_warm = is_warm && cuda_add(&self->layer, &add, 1) && CUDA_OK(self, StreamSynchronize, self->add_stream) &&
            CUDA_OK(self, StreamSynchronize, self->copy_stream);
  cuda_free(&self->layer, &device);
  return is_warm;
}

MemoryLayer* memory_cuda_open(void) {
  const CudaDriver* cuda = cuda_driver();
  CudaContext application = NULL;
  if (cuda == NULL || cuda->CtxGetCurrent(&application) != kCudaSuccess || application == NULL) return NULL;
  CudaLayer* self = calloc(1, sizeof *self);
  if (self == NULL) return NULL;
  *self = (CudaLayer){
      .layer = {.share = cuda_share,
                .unshare = cuda_unshare,
                .attach = cuda_attach,
                .detach = cuda_detach,
                .allocate = cuda_allocate,
                .free = cuda_free,
                .close = cuda_close,
                .enter = cuda_enter,
                .copy = cuda_copy,
                .mark = cuda_mark,
                .has_reached = cuda_has_reached,
                .add = cuda_add},
      .cuda = cuda,
      .application = application,
  };
  bool is_ready = false;
  if (acquire_context(self)) {
    (void)enter_context(self);
    is_ready = create(self) && warm_up(self);
    leave_context(self, application);
  }
  if (is_ready) {
    LOOPBACK_INFO("copies are asked of %s", self->has_batches ? "the copy engines" : "the driver's choice");
    return &self->layer;
  }
  cuda_close(&self->layer);
  return NULL;
}
