#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <string.h>

#include "log.h"

typedef struct {
  const char* name;
  size_t offset;
  bool is_optional;
} Entry;

#define ENTRY(field, symbol) {symbol, offsetof(CudaDriver, field), false}

static const Entry kEntries[] = {
    ENTRY(CtxCreate, "cuCtxCreate_v2"),
    ENTRY(CtxDestroy, "cuCtxDestroy_v2"),
    ENTRY(CtxPopCurrent, "cuCtxPopCurrent_v2"),
    ENTRY(CtxGetCurrent, "cuCtxGetCurrent"),
    ENTRY(CtxSetCurrent, "cuCtxSetCurrent"),
    ENTRY(CtxGetDevice, "cuCtxGetDevice"),
    ENTRY(CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange"),
    ENTRY(GetErrorName, "cuGetErrorName"),
    ENTRY(MemRetainAllocationHandle, "cuMemRetainAllocationHandle"),
    ENTRY(MemRelease, "cuMemRelease"),
    ENTRY(MemGetAddressRange, "cuMemGetAddressRange_v2"),
    ENTRY(MemExportToShareableHandle, "cuMemExportToShareableHandle"),
    ENTRY(MemImportFromShareableHandle, "cuMemImportFromShareableHandle"),
    ENTRY(MemAddressReserve, "cuMemAddressReserve"),
    ENTRY(MemAddressFree, "cuMemAddressFree"),
    ENTRY(MemMap, "cuMemMap"),
    ENTRY(MemUnmap, "cuMemUnmap"),
    ENTRY(MemSetAccess, "cuMemSetAccess"),
    ENTRY(MemAlloc, "cuMemAlloc_v2"),
    ENTRY(MemFree, "cuMemFree_v2"),
    ENTRY(MemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2"),
    ENTRY(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2"),
    ENTRY(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2"),
    {"cuMemcpyBatchAsync_v2", offsetof(CudaDriver, MemcpyBatchAsync), true},
    ENTRY(StreamCreateWithPriority, "cuStreamCreateWithPriority"),
    ENTRY(StreamSynchronize, "cuStreamSynchronize"),
    ENTRY(StreamDestroy, "cuStreamDestroy_v2"),
    ENTRY(EventCreate, "cuEventCreate"),
    ENTRY(EventRecord, "cuEventRecord"),
    ENTRY(EventQuery, "cuEventQuery"),
    ENTRY(EventDestroy, "cuEventDestroy_v2"),
    ENTRY(ModuleLoadData, "cuModuleLoadData"),
    ENTRY(ModuleGetFunction, "cuModuleGetFunction"),
    ENTRY(ModuleUnload, "cuModuleUnload"),
    ENTRY(LaunchKernel, "cuLaunchKernel"),
};

static CudaDriver loaded;
static bool is_loaded;

static void load(void) {
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == NULL) return;
  for (size_t i = 0; i < sizeof kEntries / sizeof kEntries[0]; i++) {
    void* symbol = dlsym(library, kEntries[i].name);
    if (symbol == NULL && !kEntries[i].is_optional) {
      LOOPBACK_WARN("libcuda.so.1 has no %s", kEntries[i].name);
      return;
    }
    // ISO C has no conversion from an object's address to a function's.
    memcpy((char*)&loaded + kEntries[i].offset, &symbol, sizeof symbol);
  }
  is_loaded = true;
}

const CudaDriver* cuda_driver(void) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  pthread_once(&once, load);
  return is_loaded ? &loaded : NULL;
}
