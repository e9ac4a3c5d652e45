// The transforms of Winograd's minimal filtering (Lavin & Gray, arXiv 1509.09308), on vectors of channels.
//
// A tile is kOut x kOut outputs, computed from a window of kIn x kIn inputs with kFrequencies^2 products per
// pair of
// channels: y = At [ (G w Gt) . (Bt x B) ] A. Windows begin kStep inputs apart, the first kPadding before the
// image. The first kShared frequencies of a dimension share their weights, the others have their own. Weights
// are transformed here except for kScales, one over the product of a point's distances to the others, or in
// Python (ops/_conv_winograd.py): the points here and there are the same.
#pragma once

#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// F(2 x 2, 3 x 3) of stride 1. Points 0, 1, -1 and infinity.
struct Filter2 {
    static constexpr int kIn = 4, kFrequencies = 4, kShared = 1, kOut = 2, kStep = 2, kPadding = 1;
    static constexpr double kScales[4] = {-1, 0.5, 0.5, 1};

    static inline __attribute__((always_inline)) void weights(const vf (&w)[3], vf (&out)[4]) {
        out[0] = w[0];
        out[1] = w[0] + w[2] + w[1];
        out[2] = w[0] + w[2] - w[1];
        out[3] = w[2];
    }

    static inline __attribute__((always_inline)) void input(const vf (&x)[4], vf (&out)[4]) {
        out[0] = x[2] - x[0];
        out[1] = x[2] + x[1];
        out[2] = x[2] - x[1];
        out[3] = x[3] - x[1];
    }

    static inline __attribute__((always_inline)) void output(const vf (&m)[4], vf (&y)[2]) {
        y[0] = m[0] + m[1] + m[2];
        y[1] = m[1] - m[2] + m[3];
    }
};

// Points a, -a, b and -b.
struct Pairs {
    float a, b;

    // One over the product of the distances of a, and of b, to the other three.
    constexpr double scale_a() const { return 1 / (2.0 * a * (1.0 * a * a - 1.0 * b * b)); }
    constexpr double scale_b() const { return 1 / (2.0 * b * (1.0 * b * b - 1.0 * a * a)); }

    // For even and odd powers: w0 + p^2 w2 or w0 alone, and w1.
    inline __attribute__((always_inline)) void weights(vf even_a, vf even_b, vf odd, vf* out) const {
        out[0] = even_a + splat(a) * odd;
        out[1] = even_a - splat(a) * odd;
        out[2] = even_b + splat(b) * odd;
        out[3] = even_b - splat(b) * odd;
    }

    inline __attribute__((always_inline)) void input(const vf* x, vf* out) const {
        const vf va = splat(a), vb = splat(b), a2 = splat(a * a), b2 = splat(b * b);
        const vf even_a = x[3] - b2 * x[1], odd_a = x[2] - b2 * x[0];
        const vf even_b = x[3] - a2 * x[1], odd_b = x[2] - a2 * x[0];
        out[0] = even_a + va * odd_a;
        out[1] = even_a - va * odd_a;
        out[2] = even_b + vb * odd_b;
        out[3] = even_b - vb * odd_b;
    }

    // For the point 0, which precedes these, and for infinity.
    inline __attribute__((always_inline)) vf edge(vf x0, vf x2, vf x4) const {
        return x4 - splat(a * a + b * b) * x2 + splat(a * a * b * b) * x0;
    }

    // Adds the contribution of these points to four outputs.
    inline __attribute__((always_inline)) void output(const vf* m, vf (&y)[4]) const {
        const vf sum_a = m[0] + m[1], sum_b = m[2] + m[3];
        const vf difference_a = m[0] - m[1], difference_b = m[2] - m[3];
        y[0] = y[0] + sum_a + sum_b;
        y[1] = y[1] + splat(a) * difference_a + splat(b) * difference_b;
        y[2] = y[2] + splat(a * a) * sum_a + splat(b * b) * sum_b;
        y[3] = y[3] + splat(a * a * a) * difference_a + splat(b * b * b) * difference_b;
    }
};

// F(4 x 4, 3 x 3) of stride 1. Points 0, a, -a, b, -b and infinity. a = 5/8 and b = 3/2 have half the error
// of the usual 1 and 2, for the same number of operations, and all powers here are exact.
struct Filter4 {
    static constexpr int kIn = 6, kFrequencies = 6, kShared = 1, kOut = 4, kStep = 4, kPadding = 1;
    static constexpr Pairs kPairs = {0.625f, 1.5f};
    static constexpr double kA = kPairs.a, kB = kPairs.b, kScaleA = kPairs.scale_a() / kA,
                            kScaleB = kPairs.scale_b() / kB;
    static constexpr double kScales[6] = {1 / (kA * kA * kB * kB), kScaleA, kScaleA, kScaleB, kScaleB, 1};

    static inline __attribute__((always_inline)) void weights(const vf (&w)[3], vf (&out)[6]) {
        const float a = kPairs.a, b = kPairs.b;
        out[0] = w[0];
        kPairs.weights(w[0] + splat(a * a) * w[2], w[0] + splat(b * b) * w[2], w[1], out + 1);
        out[5] = w[2];
    }

    static inline __attribute__((always_inline)) void input(const vf (&x)[6], vf (&out)[6]) {
        out[0] = kPairs.edge(x[0], x[2], x[4]);
        kPairs.input(x + 1, out + 1);
        out[5] = kPairs.edge(x[1], x[3], x[5]);
    }

    static inline __attribute__((always_inline)) void output(const vf (&m)[6], vf (&y)[4]) {
        y[0] = m[0];
        y[1] = y[2] = vf{};
        y[3] = m[5];
        kPairs.output(m + 1, y);
    }
};

// F(4, 2): four sums of two taps with five products. Points a, -a, b, -b and infinity. a = 3/8 and b = 5/4
// have half the error of 0, 1, -1 and 2.
struct TwoTaps {
    static constexpr Pairs kPairs = {0.375f, 1.25f};
    static constexpr double kScaleA = kPairs.scale_a(), kScaleB = kPairs.scale_b();

    static inline __attribute__((always_inline)) void weights(vf first, vf second, vf* out) {
        kPairs.weights(first, first, second, out);
        out[4] = second;
    }

    static inline __attribute__((always_inline)) void input(const vf (&x)[5], vf* out) {
        kPairs.input(x, out);
        out[4] = kPairs.edge(x[0], x[2], x[4]);
    }

    // Adds the four sums.
    static inline __attribute__((always_inline)) void output(const vf* m, vf (&y)[4]) {
        y[3] += m[4];
        kPairs.output(m, y);
    }
};

// 4 x 4 outputs of stride 2, 3 x 3. The middle tap reads every second input, without a transform; the other
// two read the inputs between.
struct FilterStride2 {
    static constexpr int kIn = 9, kFrequencies = 9, kShared = 4, kOut = 4, kStep = 8, kPadding = 1;

    static constexpr double kScales[6] = {
        1, TwoTaps::kScaleA, -TwoTaps::kScaleA, TwoTaps::kScaleB, -TwoTaps::kScaleB, 1};

    static inline __attribute__((always_inline)) void weights(const vf (&w)[3], vf (&out)[6]) {
        out[0] = w[1];
        TwoTaps::weights(w[0], w[2], out + 1);
    }

    static inline __attribute__((always_inline)) void input(const vf (&x)[9], vf (&out)[9]) {
        const vf between[5] = {x[0], x[2], x[4], x[6], x[8]};
        for (int i = 0; i < 4; ++i) out[i] = x[2 * i + 1];
        TwoTaps::input(between, out + 4);
    }

    static inline __attribute__((always_inline)) void output(const vf (&m)[9], vf (&y)[4]) {
        for (int i = 0; i < 4; ++i) y[i] = m[i];
        TwoTaps::output(m + 4, y);
    }
};

// 8 x 8 outputs of the transposed convolution of stride 2, 3 x 3, padding 1 and output padding 1. Even
// outputs use the middle tap, odd ones the other two.
struct FilterTransposed {
    static constexpr int kIn = 5, kFrequencies = 9, kShared = 4, kOut = 8, kStep = 4, kPadding = 0;

    static constexpr double kScales[6] = {
        1, TwoTaps::kScaleA, -TwoTaps::kScaleA, TwoTaps::kScaleB, -TwoTaps::kScaleB, 1};

    static inline __attribute__((always_inline)) void weights(const vf (&w)[3], vf (&out)[6]) {
        out[0] = w[1];
        TwoTaps::weights(w[2], w[0], out + 1);
    }

    static inline __attribute__((always_inline)) void input(const vf (&x)[5], vf (&out)[9]) {
        for (int i = 0; i < 4; ++i) out[i] = x[i];
        TwoTaps::input(x, out + 4);
    }

    static inline __attribute__((always_inline)) void output(const vf (&m)[9], vf (&y)[8]) {
        vf odd[4] = {};
        TwoTaps::output(m + 4, odd);
        for (int i = 0; i < 4; ++i) {
            y[2 * i] = m[i];
            y[2 * i + 1] = odd[i];
        }
    }
};

// In two dimensions: the columns of kIn x kIn vectors, then the rows of the resulting kOut x kIn.
// Calls get(row, column) and put(row, column, vector).
template <int kIn, int kOut, void (*kTransform)(const vf (&)[kIn], vf (&)[kOut]), typename Get, typename Put>
static inline __attribute__((always_inline)) void transform_square(const Get& get, const Put& put) {
    vf half[kOut][kIn];
#pragma GCC unroll 9
    for (int column = 0; column < kIn; ++column) {
        vf in[kIn], out[kOut];
#pragma GCC unroll 9
        for (int row = 0; row < kIn; ++row) in[row] = get(row, column);
        kTransform(in, out);
#pragma GCC unroll 9
        for (int row = 0; row < kOut; ++row) half[row][column] = out[row];
    }
#pragma GCC unroll 9
    for (int row = 0; row < kOut; ++row) {
        vf out[kOut];
        kTransform(half[row], out);
#pragma GCC unroll 9
        for (int column = 0; column < kOut; ++column) put(row, column, out[column]);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
