// h = act(scale1 * conv3x3(x, weight) + shift1); out = relu(scale2 * conv3x3(h, weight) + shift2 + x),
// plus x once more with `skip`: the shared-weights residual block on tensor cores.
#pragma once

#include "tensor.h"

namespace shelfkern {
namespace cuda {

struct SharedBlock {
    Nhwc x;  // up to 128 channels, bf16 or f16
    // 9 taps x (padded / 64) x padded x 64 in x's type: for each tap and 64 input channels, a row of 64 for
    // each output channel; padded is c rounded up to 64 or 128, with zeros beyond c.
    const void* weight;
    const float *scale1, *shift1, *scale2, *shift2;  // padded
    Nhwc out;
    DType dtype;
    float slope;  // slope of act: 0 relu, 1 none
    bool skip;
    int rows;        // output rows per tile: 4, 8 or 12 for 64 padded channels, 4 or 8 for 128
    int64_t blocks;  // at most; each processes tiles until none is left
};

void shared_block(const SharedBlock& op, Stream stream);

}  // namespace cuda
}  // namespace shelfkern
