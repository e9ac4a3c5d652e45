// The gradient of upsample_bilinear with respect to its scores: each low-resolution pixel sums the
// gradients of the full-size pixels that read it, rows first and then columns, always in the same order.
#include "dtypes.h"
#include "gather.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Low-resolution rows per task: enough tasks for a few planes, and each full-size row that two tasks share is
// in the cache of one of them.
constexpr int64_t kRowsPerTask = 16;

// Pixels of a row that are summed at once: whole cache lines, because rows may be a multiple of a page apart.
constexpr int kVectors = 4;
constexpr int64_t kBlock = kVectors * kLanes;

// sum[x] = the weighted sum of the rows' pixels x.
template <typename T>
void add_rows(const T* gradient, int64_t width, const Support& rows, const float* weights, float* sum) {
    int64_t x = 0;
    for (; x + kBlock <= width; x += kBlock) {
        vf totals[kVectors] = {};
        for (int64_t i = 0; i < rows.count; ++i) {
            const T* from = gradient + (rows.begin + i) * width + x;
            for (int v = 0; v < kVectors; ++v) totals[v] += load(from + v * kLanes) * splat(weights[i]);
        }
        for (int v = 0; v < kVectors; ++v) store(sum + x + v * kLanes, totals[v]);
    }
    for (; x < width; ++x) {
        float total = 0;
        for (int64_t i = 0; i < rows.count; ++i) {
            total += load_one(gradient + (rows.begin + i) * width + x) * weights[i];
        }
        sum[x] = total;
    }
}

template <typename T>
void add_columns(const float* sum, const Supports& columns, int64_t width, T* out) {
    for (int64_t x = 0; x < width; ++x) {
        const Support& support = columns.of[x];
        const float *from = sum + support.begin, *weights = columns.weights + support.at;
        float total = 0;
        for (int64_t i = 0; i < support.count; ++i) total += from[i] * weights[i];
        store_one(out + x, total);
    }
}

template <typename T>
void run(const Resize& a) {
    const Supports rows = make_supports(0, a.h, a.full_h, a.out_h, a.align_corners);
    const Supports columns = make_supports(1, a.w, a.full_w, a.out_w, a.align_corners);
    const int64_t pieces = (a.h + kRowsPerTask - 1) / kRowsPerTask;
    parallel_for(a.threads, a.n * a.c * pieces, [&](int64_t task) {
        const int64_t plane = task / pieces, begin = task % pieces * kRowsPerTask;
        const T* gradient = static_cast<const T*>(a.scores) + plane * a.out_h * a.out_w;
        T* out = static_cast<T*>(a.out) + plane * a.h * a.w;
        float* sum = static_cast<float*>(thread_scratch(2, a.out_w * 4));
        for (int64_t y = begin; y < begin + kRowsPerTask && y < a.h; ++y) {
            add_rows(gradient, a.out_w, rows.of[y], rows.weights + rows.of[y].at, sum);
            add_columns(sum, columns, a.w, out + y * a.w);
        }
    });
}

}  // namespace

void upsample_bilinear_backward(const Resize& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
