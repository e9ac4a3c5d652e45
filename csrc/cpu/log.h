// The natural logarithm of a vector of floats, one source for every instruction set.
#pragma once

#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// ln v within 1 ulp or so for positive, normal, finite v; NaN stays NaN.
static inline vf log(vf v) {
    // v = 2^n m, with m from sqrt(1/2) to sqrt(2), so that values near 1 lose no precision.
    const vi n = ((vi)v - 0x3f3504f3) >> 23;
    const vf m = (vf)((vi)v - (n << 23));
    // ln m = 2 artanh(s), whose series ends here with a relative error of 2e-9: s^2 is below 0.0295.
    const vf s = (m - 1.0f) / (m + 1.0f), square = s * s;
    vf q = square * splat(1.0f / 9) + splat(1.0f / 7);
    q = q * square + splat(1.0f / 5);
    q = q * square + splat(1.0f / 3);
    const vf twice = s + s, of_m = twice * square * q + twice;
    // The high part of ln 2 has 15 bits: its products with n are exact.
    const vf whole = __builtin_convertvector(n, vf);
    const vf result = whole * splat(0x1.62e4p-1f) + (whole * splat(0x1.7f7d1cp-20f) + of_m);
    return v == v ? result : v;
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
