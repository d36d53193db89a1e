// A span of floats as kernels see it: reached through scale.cuh, so that the tests have a header of a header.
#pragma once

namespace toy {

struct Vector {
    float* values;
    int num_values;
};

}  // namespace toy
