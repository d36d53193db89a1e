// A kernel that includes NCCL's device headers. For tests.
#pragma once

#include <nccl_device.h>

#include <toy/scale.cuh>

namespace toy {

template <ScaleConfig kConfig>
__device__ __forceinline__ void write_nccl_version(const ScaleParams& p) {
    p.num_arrived[0] = NCCL_VERSION_CODE;
}

}  // namespace toy
