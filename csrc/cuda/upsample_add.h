// skip + gate[n, c] * nearest_x2(x) on NHWC tensors, on a GPU.
#pragma once

#include "tensor.h"

namespace shelfkern {
namespace cuda {

// x: n h w c; skip, out: n 2h 2w c; all of one dtype. gate: n c float32, contiguous, or null for ones.
struct UpsampleAdd {
    Nhwc x, skip;
    const float* gate;
    Nhwc out;
    DType dtype;
};

// Enqueues the kernel on a cudaStream_t; throws std::runtime_error on CUDA errors.
void upsample_add(const UpsampleAdd& op, Stream stream);

}  // namespace cuda
}  // namespace shelfkern
