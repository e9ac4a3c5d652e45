// out += softmax over classes, or exp, of the bilinear resize of NHWC scores, on a GPU.
#pragma once

#include "tensor.h"

namespace shelfkern {
namespace cuda {

// scores: n h w c, resized to full_h x full_w, then flipped left-right if mirror. out: n c out_h out_w
// float32, the first rows and columns; columns are contiguous, other strides count elements.
struct UpsampleSoftmaxSum {
    Nhwc scores;
    float* out;
    DType dtype;
    int64_t full_h, full_w, out_h, out_w;
    int64_t stride_n, stride_c, stride_h;
    bool mirror, exp, align_corners;
};

// Enqueues the kernel on a cudaStream_t; throws std::runtime_error on CUDA errors.
void upsample_softmax_sum(const UpsampleSoftmaxSum& op, Stream stream);

}  // namespace cuda
}  // namespace shelfkern
