// Owns the part of the CUDA driver's interface that the plugin calls, in declarations of its own, so that it compiles
// without the toolkit. The library is opened at run time.
#ifndef DEEP_EP_CORE_LOOPBACK_CUDA_DRIVER_H
#define DEEP_EP_CORE_LOOPBACK_CUDA_DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef int CudaResult;
enum { kCudaSuccess = 0, kCudaNotReady = 600 };

typedef uint64_t CudaPointer;
typedef void* CudaContext;
typedef void* CudaStream;
typedef void* CudaEvent;
typedef uint64_t CudaHandle;

typedef struct {
  int type;
  int id;
} CudaLocation;

typedef struct {
  CudaLocation location;
  int flags;
} CudaAccess;

typedef struct {
  int source_order;
  CudaLocation source_hint;
  CudaLocation destination_hint;
  unsigned flags;
} CudaCopyAttributes;

enum {
  kCudaLocationDevice = 1,
  kCudaAccessReadWrite = 3,
  kCudaHandlePosixFd = 1,
  kCudaStreamNonBlocking = 1,
  kCudaEventNoTiming = 2,
  kCudaCopyInStreamOrder = 1,
  // Asks for a copy engine: a copy by the GPU's cores may wait for cores that kernels hold, which wait for the copy.
  kCudaCopyBesideKernels = 1,
};

// The driver's functions, without their prefix `cu`.
typedef struct {
  CudaResult (*CtxCreate)(CudaContext* context, unsigned flags, int device);
  CudaResult (*CtxDestroy)(CudaContext context);
  CudaResult (*CtxPopCurrent)(CudaContext* context);
  CudaResult (*CtxGetCurrent)(CudaContext* context);
  CudaResult (*CtxSetCurrent)(CudaContext context);
  CudaResult (*CtxGetDevice)(int* device);
  CudaResult (*CtxGetStreamPriorityRange)(int* least, int* greatest);
  CudaResult (*GetErrorName)(CudaResult result, const char** name);
  CudaResult (*MemRetainAllocationHandle)(CudaHandle* handle, void* address);
  CudaResult (*MemRelease)(CudaHandle handle);
  CudaResult (*MemGetAddressRange)(CudaPointer* base, size_t* bytes, CudaPointer pointer);
  CudaResult (*MemExportToShareableHandle)(void* shareable, CudaHandle handle, int type, unsigned long long flags);
  CudaResult (*MemImportFromShareableHandle)(CudaHandle* handle, void* shareable, int type);
  CudaResult (*MemAddressReserve)(CudaPointer* pointer, size_t bytes, size_t alignment, CudaPointer wanted,
                                  unsigned long long flags);
  CudaResult (*MemAddressFree)(CudaPointer pointer, size_t bytes);
  CudaResult (*MemMap)(CudaPointer pointer, size_t bytes, size_t offset, CudaHandle handle, unsigned long long flags);
  CudaResult (*MemUnmap)(CudaPointer pointer, size_t bytes);
  CudaResult (*MemSetAccess)(CudaPointer pointer, size_t bytes, const CudaAccess* access, size_t num_accesses);
  CudaResult (*MemAlloc)(CudaPointer* pointer, size_t bytes);
  CudaResult (*MemFree)(CudaPointer pointer);
  CudaResult (*MemcpyDtoDAsync)(CudaPointer to, CudaPointer from, size_t bytes, CudaStream stream);
  CudaResult (*MemcpyHtoDAsync)(CudaPointer to, const void* from, size_t bytes, CudaStream stream);
  CudaResult (*MemcpyDtoHAsync)(void* to, CudaPointer from, size_t bytes, CudaStream stream);
  // Since CUDA 13; NULL before.
  CudaResult (*MemcpyBatchAsync)(CudaPointer* to, CudaPointer* from, size_t* bytes, size_t num_copies,
                                 CudaCopyAttributes* attributes, size_t* attribute_starts, size_t num_attributes,
                                 CudaStream stream);
  CudaResult (*StreamCreateWithPriority)(CudaStream* stream, unsigned flags, int priority);
  CudaResult (*StreamSynchronize)(CudaStream stream);
  CudaResult (*StreamDestroy)(CudaStream stream);
  CudaResult (*EventCreate)(CudaEvent* event, unsigned flags);
  CudaResult (*EventRecord)(CudaEvent event, CudaStream stream);
  CudaResult (*EventQuery)(CudaEvent event);
  CudaResult (*EventDestroy)(CudaEvent event);
  CudaResult (*ModuleLoadData)(void** module, const void* image);
  CudaResult (*ModuleGetFunction)(void** function, void* module, const char* name);
  CudaResult (*ModuleUnload)(void* module);
  CudaResult (*LaunchKernel)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                             unsigned block_y, unsigned block_z, unsigned shared_bytes, CudaStream stream,
                             void** parameters, void** extra);
} CudaDriver;

// The functions of the library libcuda.so.1, which stays open; NULL where there is none, or it lacks one of them.
const CudaDriver* cuda_driver(void);

#endif
