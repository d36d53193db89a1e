#include "cuda_context.h"

#include <pthread.h>

enum { kMaxDevices = 64, kCudaInvalidDevice = 101 };

typedef struct {
  CudaContext context;
  int num_users;
} DeviceContext;

static DeviceContext contexts[kMaxDevices];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

CudaResult cuda_context_acquire(const CudaDriver* cuda, int device, CudaContext* context) {
  if (device < 0 || device >= kMaxDevices) return kCudaInvalidDevice;
  DeviceContext* own = &contexts[device];
  CudaResult result = kCudaSuccess;
  pthread_mutex_lock(&mutex);
  if (own->num_users == 0) {
    CudaContext popped = NULL;
    result = cuda->CtxCreate(&own->context, 0, device);
    if (result == kCudaSuccess) result = cuda->CtxPopCurrent(&popped);
  }
  if (result == kCudaSuccess) {
    own->num_users++;
    *context = own->context;
  }
  pthread_mutex_unlock(&mutex);
  return result;
}

CudaResult cuda_context_release(const CudaDriver* cuda, int device) {
  DeviceContext* own = &contexts[device];
  pthread_mutex_lock(&mutex);
  CudaResult result = --own->num_users == 0 ? cuda->CtxDestroy(own->context) : kCudaSuccess;
  pthread_mutex_unlock(&mutex);
  return result;
}
