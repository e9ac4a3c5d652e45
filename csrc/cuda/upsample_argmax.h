// Argmax over classes of the bilinear resize of NHWC scores, on a GPU.
#pragma once

#include "tensor.h"

namespace shelfkern {
namespace cuda {

// scores: n h w c, c up to 256, resized to full_h x full_w. labels: n out_h out_w, contiguous, the first
// out_h rows and out_w columns of the result.
struct UpsampleArgmax {
    Nhwc scores;
    uint8_t* labels;
    DType dtype;
    int64_t full_h, full_w, out_h, out_w;
    bool align_corners;
};

// Enqueues the kernel on a cudaStream_t; throws std::runtime_error on CUDA errors.
void upsample_argmax(const UpsampleArgmax& op, Stream stream);

}  // namespace cuda
}  // namespace shelfkern
