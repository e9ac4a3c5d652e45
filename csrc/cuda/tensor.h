// Tensors as the GPU ops' arguments: addresses, sizes and strides, checked by shelfkern/ops.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "half.h"

namespace shelfkern {
namespace cuda {

enum class DType : int { f32 = 0, bf16 = 1, u8 = 2, f16 = 3 };

// Calls run with a value of the floating type that dtype denotes.
template <typename Run>
void with_type(const char* op, DType dtype, const Run& run) {
    if (dtype == DType::f32) return run(float{});
    if (dtype == DType::bf16) return run(BF16{});
    if (dtype == DType::f16) return run(F16{});
    throw std::runtime_error(std::string(op) + ": dtype is uint8, it may be a floating one");
}

// An NHWC tensor or a window of one. Channels are contiguous; the other strides count elements.
struct Nhwc {
    void* data;
    int64_t n, h, w, c;
    int64_t stride_n, stride_h, stride_w;

    bool empty() const { return n == 0 || h == 0 || w == 0 || c == 0; }

    // Elements from the first to the last, inclusive.
    int64_t extent() const {
        return empty() ? 0 : (n - 1) * stride_n + (h - 1) * stride_h + (w - 1) * stride_w + c;
    }

    // Whether every pixel consists of whole packs of `vector` elements, aligned to their size.
    bool has_packs(int64_t vector, int64_t element_bytes) const {
        const bool aligned = reinterpret_cast<uintptr_t>(data) % (vector * element_bytes) == 0;
        const auto whole = [&](int64_t size, int64_t stride) { return size <= 1 || stride % vector == 0; };
        return aligned && c % vector == 0 && whole(n, stride_n) && whole(h, stride_h) && whole(w, stride_w);
    }
};

// The cudaStream_t on which kernels are enqueued. With overlap a kernel may start before its predecessor has
// ended, and waits for it before reading anything but weights, which must have been written long before.
struct Stream {
    void* handle = nullptr;
    bool overlap = false;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda
}  // namespace shelfkern
