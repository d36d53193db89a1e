// Owns the binary interface of NCCL's RMA plugins, versions 14 and 16, in declarations of this project: NCCL's wheels
// do not ship the plugin headers. Tests hold sizes, offsets and codes against NCCL's public headers where those tell.
// NCCL 2.30.7 looks up version 14, NCCL 2.32 version 16 first. Names of fields are ours; order and types are NCCL's.
#ifndef DEEP_EP_CORE_LOOPBACK_NCCL_ABI_H
#define DEEP_EP_CORE_LOOPBACK_NCCL_ABI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// ncclResult_t.
typedef enum {
  kNcclSuccess = 0,
  kNcclUnhandledCudaError = 1,
  kNcclSystemError = 2,
  kNcclInternalError = 3,
  kNcclInvalidArgument = 4,
  kNcclInvalidUsage = 5,
  kNcclRemoteError = 6,
} NcclResult;

// What NCCL's log function takes.
enum { kNcclLogWarn = 2, kNcclLogInfo = 3 };
enum { kNcclLogInit = 0x1, kNcclLogNet = 0x10 };
typedef void (*NcclLogger)(int level, unsigned long subsystems, const char* file, int line, const char* format, ...);

// Kinds of memory, a bit each in `pointer_support`.
enum { kNcclPointerHost = 1, kNcclPointerCuda = 2 };
// How a signal changes its word.
enum { kNcclSignalIncrement = 1, kNcclSignalAdd = 2 };
// Bytes of the handle that `listen` fills and NCCL carries to all ranks.
enum { kNcclHandleBytes = 128 };
enum { kNcclDeviceGinProxy = 2 };

typedef struct {
  char* name;
  char* pci_path;
  uint64_t guid;
  int pointer_support;
  int is_registration_global;
  int needs_flush;
  int speed_mbps;
  int port;
  float latency_us;
  int max_comms;
  int max_recvs;
  int device_type;
  int device_version;
  struct {
    int num_devices;
    int devices[8];
  } virtual_devices;
  size_t max_p2p_bytes;
  size_t max_collective_bytes;
  int max_multi_request;
  int16_t rail_id;
  int16_t plane_id;
} NcclNetProperties;

// Later fields differ between versions; this plugin reads the first one only.
typedef struct {
  int num_contexts;
} NcclRmaConfig;

typedef struct {
  bool does_any_signal_flush_all_puts;
} NcclRmaProperties;

typedef struct {
  const char* name;
  NcclResult (*init)(void** instance, uint64_t comm_id, NcclLogger logger);
  NcclResult (*devices)(int* num_devices);
  NcclResult (*get_properties)(int device, NcclNetProperties* properties);
  NcclResult (*listen)(void* instance, int device, void* handle, void** listener);
  NcclResult (*connect)(void* instance, void* handles[], int num_ranks, int rank, void* listener, void** comm);
  NcclResult (*create_context)(void* comm, NcclRmaConfig* config, void** context);
  NcclResult (*register_memory)(void* comm, void* data, size_t bytes, int kind, uint64_t flags, void** memory);
  NcclResult (*register_dma_buf)(void* comm, void* data, size_t bytes, int kind, uint64_t offset, int fd,
                                 uint64_t flags, void** memory);
  NcclResult (*deregister_memory)(void* comm, void* memory);
  NcclResult (*destroy_context)(void* context);
  NcclResult (*close_comm)(void* comm);
  NcclResult (*close_listener)(void* listener);
  NcclResult (*put)(void* context, int idx, uint64_t from_offset, void* from, size_t bytes, uint64_t to_offset,
                    void* to, uint32_t rank, void** request);
  NcclResult (*put_signal)(void* context, int idx, uint64_t from_offset, void* from, size_t bytes, uint64_t to_offset,
                           void* to, uint32_t rank, uint64_t signal_offset, void* signal_memory, uint64_t value,
                           uint32_t operation, bool is_strong, void** request);
  NcclResult (*get)(void* context, int idx, uint64_t remote_offset, void* remote, size_t bytes, uint64_t local_offset,
                    void* local, uint32_t rank, void** request);
  NcclResult (*flush)(void* context, int idx, void* memory, uint32_t rank, void** request);
  NcclResult (*test)(void* comm, void* request, int* is_done);
  NcclResult (*progress)(void* context);
  NcclResult (*query_last_error)(void* context, bool* has_error);
  NcclResult (*finalize)(void* instance);
} NcclRmaPluginV14;

typedef struct {
  const char* name;
  NcclResult (*init)(void** instance, uint64_t comm_id, NcclLogger logger);
  NcclResult (*devices)(int* num_devices);
  NcclResult (*get_rma_properties)(void* comm, NcclRmaProperties* properties);
  NcclResult (*get_properties)(int device, NcclNetProperties* properties);
  NcclResult (*listen)(void* instance, int device, void* handle, void** listener);
  NcclResult (*connect)(void* instance, void* handles[], int num_ranks, int rank, void* listener, void** comm);
  NcclResult (*create_context)(void* comm, NcclRmaConfig* config, void** context);
  NcclResult (*register_memory)(void* comm, void* data, size_t bytes, int kind, uint64_t flags, void** memory);
  NcclResult (*register_dma_buf)(void* comm, void* data, size_t bytes, int kind, uint64_t offset, int fd,
                                 uint64_t flags, void** memory);
  NcclResult (*deregister_memory)(void* comm, void* memory);
  NcclResult (*destroy_context)(void* context);
  NcclResult (*close_comm)(void* comm);
  NcclResult (*close_listener)(void* listener);
  // `options` asks to hold back a doorbell; there is none here.
  NcclResult (*put)(void* context, int idx, uint64_t from_offset, void* from, size_t bytes, uint64_t to_offset,
                    void* to, uint32_t rank, uint32_t options, void** request);
  NcclResult (*put_signal)(void* context, int idx, uint64_t from_offset, void* from, size_t bytes, uint64_t to_offset,
                           void* to, uint32_t rank, uint64_t signal_offset, void* signal_memory, uint64_t value,
                           uint32_t operation, bool is_strong, uint32_t options, void** request);
  NcclResult (*get)(void* context, int idx, uint64_t remote_offset, void* remote, size_t bytes, uint64_t local_offset,
                    void* local, uint32_t rank, uint32_t options, void** request);
  NcclResult (*flush)(void* context, int idx, void* memory, uint32_t rank, void** request);
  NcclResult (*test)(void* comm, void* request, int* is_done);
  NcclResult (*progress)(void* context);
  NcclResult (*query_last_error)(void* context, bool* has_error);
  NcclResult (*finalize)(void* instance);
} NcclRmaPluginV16;

#endif
