// Owns the way to NCCL's log (NCCL_DEBUG).
#ifndef DEEP_EP_CORE_LOOPBACK_LOG_H
#define DEEP_EP_CORE_LOOPBACK_LOG_H

#include "nccl_abi.h"

// What NCCL passed to `init`; NULL before that.
extern NcclLogger loopback_logger;

#define LOOPBACK_LOG(level, ...)                                                                     \
  do {                                                                                               \
    if (loopback_logger != NULL) {                                                                   \
      loopback_logger(level, kNcclLogInit | kNcclLogNet, __FILE__, __LINE__, "loopback: " __VA_ARGS__); \
    }                                                                                                \
  } while (0)
#define LOOPBACK_WARN(...) LOOPBACK_LOG(kNcclLogWarn, __VA_ARGS__)
#define LOOPBACK_INFO(...) LOOPBACK_LOG(kNcclLogInfo, __VA_ARGS__)

#endif
