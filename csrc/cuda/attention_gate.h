// sigmoid(scale * (weight @ mean over h, w of x) + shift), on a GPU.
#pragma once

#include "tensor.h"

namespace shelfkern {
namespace cuda {

struct AttentionGate {
    Nhwc x;                               // at least one pixel
    const float *weight, *scale, *shift;  // k c, k and k, contiguous
    float* sums;                          // memory for n slices c
    int64_t slices;                       // slices of the pixels, each summed by separate blocks
    float* out;                           // n k, contiguous
    int64_t k;
    DType dtype;  // dtype of x
};

// Enqueues the kernels on a cudaStream_t; throws std::runtime_error on CUDA errors.
void attention_gate(const AttentionGate& op, Stream stream);

}  // namespace cuda
}  // namespace shelfkern
