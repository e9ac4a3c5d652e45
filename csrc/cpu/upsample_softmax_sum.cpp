#include <limits>

#include "dtypes.h"
#include "exp.h"
#include "resize.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Pixels processed at once: a few whole cache lines of out in every class.
constexpr int64_t kVectors = 4, kPixels = kVectors * kLanes;

// exp of every class for one vector of pixels, into values[k * kPixels]; returns its factor.
vf exponentials(const Resize& a, const float* blended, const Columns& column, const int64_t* first,
                const int64_t* next, float* values) {
    const int64_t stride = blended_stride(a);
    for (int64_t k = 0; k < a.c; ++k) {
        store(values + k * kPixels, exp(resize_columns(blended + k * stride, column, first, next)));
    }
    return splat(1.0f);
}

// exp of the values minus each pixel's maximum; the factor makes their sum 1.
vf softmax(const Resize& a, const float* blended, const Columns& column, const int64_t* first,
           const int64_t* next, float* values) {
    const int64_t stride = blended_stride(a);
    vf greatest = splat(-std::numeric_limits<float>::infinity());
    for (int64_t k = 0; k < a.c; ++k) {
        const vf value = resize_columns(blended + k * stride, column, first, next);
        store(values + k * kPixels, value);
        greatest = value > greatest ? value : greatest;
    }
    vf sum = {};
    for (int64_t k = 0; k < a.c; ++k) {
        const vf value = exp(load(values + k * kPixels) - greatest);
        store(values + k * kPixels, value);
        sum += value;
    }
    return splat(1.0f) / sum;
}

// out += values * factors for adjacent pixels of one class.
void add(float* out, const float* values, const float* factors, int64_t pixels) {
    int64_t x = 0;
    for (; x + kLanes <= pixels; x += kLanes) {
        store(out + x, load(out + x) + load(values + x) * load(factors + x));
    }
    for (; x < pixels; ++x) out[x] += values[x] * factors[x];
}

template <typename T>
void run(const SoftmaxSum& sum) {
    const Resize& a = sum.resize;
    for_each_row<T>(a, [&](int64_t n, int64_t y, const float* blended, const Columns* columns,
                           const int64_t* first, const int64_t* next) {
        float* out = static_cast<float*>(a.out) + n * sum.stride_n + y * sum.stride_h;
        float* values = static_cast<float*>(thread_scratch(2, a.c * kPixels * 4));
        float factors[kPixels];
        for (int64_t begin = 0; begin < a.out_w; begin += kPixels) {
            const int64_t pixels = a.out_w - begin < kPixels ? a.out_w - begin : kPixels;
            for (int64_t i = 0; i < pixels; i += kLanes) {
                const int64_t at = begin + i;
                const auto f = sum.exp ? exponentials : softmax;
                store(factors + i, f(a, blended, columns[at / kLanes], first + at, next + at, values + i));
            }
            for (int64_t k = 0; k < a.c; ++k) {
                add(out + k * sum.stride_c + begin, values + k * kPixels, factors, pixels);
            }
        }
    });
}

}  // namespace

void upsample_softmax_sum(const SoftmaxSum& args) {
    with_type<float, bf16>(args.resize.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
