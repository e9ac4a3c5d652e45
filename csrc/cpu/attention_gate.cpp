#include "../common/parallel.h"
#include "codes.h"
#include "dtypes.h"

// exp from libm: the standard library's templates must not be instantiated here.
#include <math.h>

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Pixels per task, summed in float32. Few, since the pieces are added in float64; the size is fixed and the
// pieces are added in order, so that the result does not depend on the number of threads.
constexpr int64_t kPiece = 64;

template <typename T>
void sum_pixels(const T* x, int64_t pixels, int64_t c, float* sums) {
    for (int64_t i = 0; i < c; ++i) sums[i] = 0;
    for (int64_t p = 0; p < pixels; ++p, x += c) {
        int64_t i = 0;
        for (; i + kLanes <= c; i += kLanes) store(sums + i, load(sums + i) + load(x + i));
        for (; i < c; ++i) sums[i] += load_one(x + i);
    }
}

void mean_of_pieces(const AttentionGate& a, const float* pieces, int64_t count, float* mean) {
    for (int64_t i = 0; i < a.c; ++i) {
        double sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += pieces[k * a.c + i];
        mean[i] = static_cast<float>(a.step * (sum / static_cast<double>(a.hw) - a.zero));
    }
}

double dot(const float* a, const float* b, int64_t count) {
    constexpr int kSums = 8;
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int k = 0; k < kSums; ++k) sums[k] += static_cast<double>(a[i + k]) * b[i + k];
    }
    double total = 0;
    for (int k = 0; k < kSums; ++k) total += sums[k];
    for (; i < count; ++i) total += static_cast<double>(a[i]) * b[i];
    return total;
}

template <typename T>
void run(const AttentionGate& a) {
    const int64_t count = (a.hw + kPiece - 1) / kPiece;
    float* pieces = static_cast<float*>(thread_scratch(0, (a.n * count + 1) * a.c * 4));
    parallel_for(a.threads, a.n * count, [&](int64_t task) {
        const int64_t n = task / count, first = task % count * kPiece;
        const int64_t pixels = a.hw - first < kPiece ? a.hw - first : kPiece;
        sum_pixels(static_cast<const T*>(a.x) + (n * a.hw + first) * a.c, pixels, a.c, pieces + task * a.c);
    });
    float* mean = pieces + a.n * count * a.c;
    for (int64_t n = 0; n < a.n; ++n) {
        mean_of_pieces(a, pieces + n * count * a.c, count, mean);
        for (int64_t k = 0; k < a.k; ++k) {
            const double z = a.scale[k] * dot(a.weight + k * a.c, mean, a.c) + a.shift[k];
            a.out[n * a.k + k] = static_cast<float>(1 / (1 + exp(-z)));
        }
    }
}

}  // namespace

void attention_gate(const AttentionGate& args) {
    with_type<float, bf16, uint8_t>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
