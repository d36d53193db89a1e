// Owns the CUDA contexts that the plugin works in: one a device and process, apart from the application's. While a
// thread of the application frees memory or loads a kernel, the driver waits for all kernels of the application's
// context and lets no other call through there; kernels that wait for the network would then wait for ever.
#ifndef DEEP_EP_CORE_LOOPBACK_CUDA_CONTEXT_H
#define DEEP_EP_CORE_LOOPBACK_CUDA_CONTEXT_H

#include "cuda_driver.h"

// The context of a device, made at the first call; connections share it, since MPS allows 48 contexts a GPU in all.
// `release` takes it back, once for each. The calling thread's context stays current.
CudaResult cuda_context_acquire(const CudaDriver* cuda, int device, CudaContext* context);

CudaResult cuda_context_release(const CudaDriver* cuda, int device);

#endif
