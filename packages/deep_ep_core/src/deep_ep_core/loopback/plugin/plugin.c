// Owns the tables that NCCL looks up, and the translation between its words and the network's.
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "log.h"
#include "nccl_abi.h"
#include "network.h"

NcclLogger loopback_logger;

typedef struct {
  int fd;
} Listener;

_Static_assert(sizeof(ControlHandle) <= kNcclHandleBytes, "the handle must fit into NCCL's");

static NcclResult plugin_init(void** instance, uint64_t comm_id, NcclLogger logger) {
  (void)comm_id;
  loopback_logger = logger;
  // Nothing belongs to an instance, but NULL might read as a failure.
  *instance = (void*)1;
  return kNcclSuccess;
}

static NcclResult plugin_devices(int* num_devices) {
  *num_devices = 1;
  return kNcclSuccess;
}

static NcclResult plugin_get_properties(int device, NcclNetProperties* properties) {
  static char name[] = "loopback";
  if (device != 0) return kNcclInvalidArgument;
  *properties = (NcclNetProperties){
      .name = name,
      .guid = 1,
      .pointer_support = kNcclPointerHost | kNcclPointerCuda,
      .speed_mbps = 400000,
      .latency_us = 1,
      .max_comms = 1024,
      .max_recvs = 16,  // NCCL's queue holds 32 times as many requests
      .device_type = kNcclDeviceGinProxy,
      .virtual_devices = {.num_devices = 1},
      .max_p2p_bytes = (size_t)1 << 40,
      .max_collective_bytes = (size_t)1 << 40,
      .max_multi_request = 1,
      .rail_id = -1,
      .plane_id = -1,
  };
  return kNcclSuccess;
}

static NcclResult plugin_get_rma_properties(void* comm, NcclRmaProperties* properties) {
  (void)comm;
  properties->does_any_signal_flush_all_puts = false;
  return kNcclSuccess;
}

static NcclResult plugin_listen(void* instance, int device, void* handle, void** listener) {
  (void)instance;
  (void)device;
  Listener* made = malloc(sizeof *made);
  if (made == NULL) return kNcclSystemError;
  ControlHandle control_handle = {0};
  made->fd = control_listen(&control_handle);
  if (made->fd < 0) {
    free(made);
    return kNcclSystemError;
  }
  memcpy(handle, &control_handle, sizeof control_handle);
  *listener = made;
  return kNcclSuccess;
}

static NcclResult plugin_connect(void* instance, void* handles[], int num_ranks, int rank, void* listener,
                                 void** comm) {
  (void)instance;
  const Listener* own = listener;
  Control* control = control_attach((const ControlHandle* const*)handles, num_ranks, rank, own->fd);
  if (control == NULL) return kNcclRemoteError;
  *comm = network_open(control);
  return *comm != NULL ? kNcclSuccess : kNcclSystemError;
}

static NcclResult plugin_create_context(void* comm, NcclRmaConfig* config, void** context) {
  *context = network_open_lanes(comm, config->num_contexts);
  return *context != NULL ? kNcclSuccess : kNcclSystemError;
}

static NcclResult plugin_register_memory(void* comm, void* data, size_t bytes, int kind, uint64_t flags,
                                         void** memory) {
  (void)flags;
  if (kind != kNcclPointerHost && kind != kNcclPointerCuda) return kNcclInvalidArgument;
  *memory = network_register(comm, data, bytes, kind == kNcclPointerHost ? kMemoryHost : kMemoryCuda);
  return *memory != NULL ? kNcclSuccess : kNcclSystemError;
}

// The properties do not offer DMA-BUF.
static NcclResult plugin_register_dma_buf(void* comm, void* data, size_t bytes, int kind, uint64_t offset, int fd,
                                          uint64_t flags, void** memory) {
  (void)comm, (void)data, (void)bytes, (void)kind, (void)offset, (void)fd, (void)flags, (void)memory;
  return kNcclInvalidUsage;
}

static NcclResult plugin_deregister_memory(void* comm, void* memory) {
  network_deregister(comm, memory);
  return kNcclSuccess;
}

static NcclResult plugin_destroy_context(void* context) {
  // NCCL destroys contexts that it failed to create, too.
  if (context != NULL) network_close_lanes(context);
  return kNcclSuccess;
}

static NcclResult plugin_close_comm(void* comm) {
  network_close(comm);
  return kNcclSuccess;
}

static NcclResult plugin_close_listener(void* listener) {
  Listener* own = listener;
  close(own->fd);
  free(own);
  return kNcclSuccess;
}

static NcclResult submit(void* context, const Message* message, void** request) {
  *request = network_submit(context, message);
  return *request != NULL ? kNcclSuccess : kNcclInvalidArgument;
}

static NcclResult plugin_put_v14(void* context, int idx, uint64_t from_offset, void* from, size_t bytes,
                                 uint64_t to_offset, void* to, uint32_t rank, void** request) {
  Message message = {.kind = kPut, .lane_idx = idx, .rank = (int)rank, .local = from, .local_offset = from_offset,
                     .remote = to, .remote_offset = to_offset, .bytes = bytes};
  return submit(context, &message, request);
}

static NcclResult plugin_put_signal_v14(void* context, int idx, uint64_t from_offset, void* from, size_t bytes,
                                        uint64_t to_offset, void* to, uint32_t rank, uint64_t signal_offset,
                                        void* signal_memory, uint64_t value, uint32_t operation, bool is_strong,
                                        void** request) {
  if (operation != kNcclSignalIncrement && operation != kNcclSignalAdd) return kNcclInvalidArgument;
  Message message = {.kind = kPut, .lane_idx = idx, .rank = (int)rank, .local = from, .local_offset = from_offset,
                     .remote = to, .remote_offset = to_offset, .bytes = bytes, .signal_memory = signal_memory,
                     .signal_offset = signal_offset,
                     .signal_value = operation == kNcclSignalIncrement ? 1 : value, .is_strong = is_strong};
  return submit(context, &message, request);
}

static NcclResult plugin_get_v14(void* context, int idx, uint64_t remote_offset, void* remote, size_t bytes,
                                 uint64_t local_offset, void* local, uint32_t rank, void** request) {
  Message message = {.kind = kGet, .lane_idx = idx, .rank = (int)rank, .local = local, .local_offset = local_offset,
                     .remote = remote, .remote_offset = remote_offset, .bytes = bytes};
  return submit(context, &message, request);
}

static NcclResult plugin_flush(void* context, int idx, void* memory, uint32_t rank, void** request) {
  (void)memory;
  Message message = {.kind = kFlush, .lane_idx = idx, .rank = (int)rank};
  return submit(context, &message, request);
}

static NcclResult plugin_put_v16(void* context, int idx, uint64_t from_offset, void* from, size_t bytes,
                                 uint64_t to_offset, void* to, uint32_t rank, uint32_t options, void** request) {
  (void)options;
  return plugin_put_v14(context, idx, from_offset, from, bytes, to_offset, to, rank, request);
}

static NcclResult plugin_put_signal_v16(void* context, int idx, uint64_t from_offset, void* from, size_t bytes,
                                        uint64_t to_offset, void* to, uint32_t rank, uint64_t signal_offset,
                                        void* signal_memory, uint64_t value, uint32_t operation, bool is_strong,
                                        uint32_t options, void** request) {
  (void)options;
  return plugin_put_signal_v14(context, idx, from_offset, from, bytes, to_offset, to, rank, signal_offset,
                               signal_memory, value, operation, is_strong, request);
}

static NcclResult plugin_get_v16(void* context, int idx, uint64_t remote_offset, void* remote, size_t bytes,
                                 uint64_t local_offset, void* local, uint32_t rank, uint32_t options,
                                 void** request) {
  (void)options;
  return plugin_get_v14(context, idx, remote_offset, remote, bytes, local_offset, local, rank, request);
}

static NcclResult plugin_test(void* comm, void* request, int* is_done) {
  RequestState state = network_test(comm, request);
  *is_done = state == kRequestDone;
  return state == kRequestFailed ? kNcclSystemError : kNcclSuccess;
}

static NcclResult plugin_query_last_error(void* context, bool* has_error) {
  *has_error = network_has_failed(lanes_network(context));
  return kNcclSuccess;
}

static NcclResult plugin_finalize(void* instance) {
  (void)instance;
  return kNcclSuccess;
}

#define COMMON_FIELDS                                                                                          \
  .name = "Loopback", .init = plugin_init, .devices = plugin_devices, .get_properties = plugin_get_properties, \
  .listen = plugin_listen, .connect = plugin_connect, .create_context = plugin_create_context,                 \
  .register_memory = plugin_register_memory, .register_dma_buf = plugin_register_dma_buf,                      \
  .deregister_memory = plugin_deregister_memory, .destroy_context = plugin_destroy_context,                    \
  .close_comm = plugin_close_comm, .close_listener = plugin_close_listener, .flush = plugin_flush,             \
  .test = plugin_test, .query_last_error = plugin_query_last_error, .finalize = plugin_finalize

// The engine's thread makes all progress, so there is no function for it.
__attribute__((visibility("default"))) const NcclRmaPluginV14 ncclRmaPlugin_v14 = {
    COMMON_FIELDS, .put = plugin_put_v14, .put_signal = plugin_put_signal_v14, .get = plugin_get_v14};

__attribute__((visibility("default"))) const NcclRmaPluginV16 ncclRmaPlugin_v16 = {
    COMMON_FIELDS, .get_rma_properties = plugin_get_rma_properties, .put = plugin_put_v16,
    .put_signal = plugin_put_signal_v16, .get = plugin_get_v16};
