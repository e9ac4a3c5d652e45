// max_pool3x3s2(act(scale * conv7x7s2(image, weight) + shift)) on a GPU, from raw or normalised images.
#pragma once

#include "tensor.h"

namespace shelfkern {
namespace cuda {

// Three channels. Strides count elements and are arbitrary: an image may be NHWC or NCHW.
struct Image {
    const void* data;
    DType dtype;
    int64_t n, h, w;
    int64_t stride_n, stride_c, stride_h, stride_w;

    bool empty() const { return n == 0 || h == 0 || w == 0; }

    // Elements from the first to the last, inclusive.
    int64_t extent() const {
        if (empty()) return 0;
        return (n - 1) * stride_n + 2 * stride_c + (h - 1) * stride_h + (w - 1) * stride_w + 1;
    }

    // Whether rows of bytes are whole, aligned groups of four.
    bool has_words() const {
        const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % 4 == 0; };
        return dtype == DType::u8 && stride_c == 1 && stride_w == 3 && w % 4 == 0 && whole(n, stride_n) &&
               whole(h, stride_h) && reinterpret_cast<uintptr_t>(data) % 4 == 0;
    }
};

struct Stem {
    Image image;          // u8, or normalised in out's type; zero-padded to 4 h x 4 w of out
    const float* values;  // 256 x 3: normalised value of a byte in each channel
    // Output channels come in groups of 64, zero-padded beyond the last; taps are filter rows of 7 x 3
    // elements.
    // f32: groups x 147 x 64. bf16, f16: groups x 64 x 184, one zero before and two after every filter row,
    // and zeros at the end.
    const void* weight;
    const float *scale, *shift;  // whole groups
    Nhwc out;
    DType dtype;
    float slope;     // slope of act: 0 relu, 1 none
    int64_t blocks;  // at most, per group; each processes tiles until none is left
};

// Enqueues the kernel on a cudaStream_t; throws std::runtime_error on CUDA errors.
void stem(const Stem& op, Stream stream);

}  // namespace cuda
}  // namespace shelfkern
