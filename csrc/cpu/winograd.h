// The transforms of Winograd's minimal filtering (Lavin & Gray, arXiv 1509.09308), on vectors of channels.
//
// A tile is kOut x kOut outputs made from a window of kIn x kIn inputs by kFrequencies^2 products a pair of
// channels: y = At [ (G w Gt) . (Bt x B) ] A. Windows begin kStep inputs after one another, the first
// kPadding before the image. The first kShared frequencies of a dimension have the same weights, the others
// their own. Python transforms the weights (ops/_conv_winograd.py): the points here and there are the same.
#pragma once

#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// F(2 x 2, 3 x 3) of stride 1. Points 0, 1, -1 and infinity.
struct Filter2 {
    static constexpr int kIn = 4, kFrequencies = 4, kShared = 1, kOut = 2, kStep = 2, kPadding = 1;

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

// F(4 x 4, 3 x 3) of stride 1. Points 0, a, -a, b, -b and infinity. The errors of a = 5/8 and b = 3/2 are
// half of those of the usual 1 and 2, for the same number of operations, and all powers here are exact.
struct Filter4 {
    static constexpr int kIn = 6, kFrequencies = 6, kShared = 1, kOut = 4, kStep = 4, kPadding = 1;
    static constexpr float kA = 0.625f, kB = 1.5f;

    static inline __attribute__((always_inline)) void input(const vf (&x)[6], vf (&out)[6]) {
        const vf a = splat(kA), b = splat(kB), a2 = splat(kA * kA), b2 = splat(kB * kB);
        const vf sum = splat(kA * kA + kB * kB), product = splat(kA * kA * kB * kB);
        const vf even_a = x[4] - b2 * x[2], odd_a = x[3] - b2 * x[1];
        const vf even_b = x[4] - a2 * x[2], odd_b = x[3] - a2 * x[1];
        out[0] = x[4] - sum * x[2] + product * x[0];
        out[1] = even_a + a * odd_a;
        out[2] = even_a - a * odd_a;
        out[3] = even_b + b * odd_b;
        out[4] = even_b - b * odd_b;
        out[5] = x[5] - sum * x[3] + product * x[1];
    }

    static inline __attribute__((always_inline)) void output(const vf (&m)[6], vf (&y)[4]) {
        const vf sum_a = m[1] + m[2], sum_b = m[3] + m[4];
        const vf difference_a = m[1] - m[2], difference_b = m[3] - m[4];
        y[0] = m[0] + sum_a + sum_b;
        y[1] = splat(kA) * difference_a + splat(kB) * difference_b;
        y[2] = splat(kA * kA) * sum_a + splat(kB * kB) * sum_b;
        y[3] = m[5] + splat(kA * kA * kA) * difference_a + splat(kB * kB * kB) * difference_b;
    }
};

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
