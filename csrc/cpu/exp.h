// exp of a vector of floats, one source for every instruction set.
#pragma once

#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// 2^n for n from -126 to 127.
static inline vf power_of_two(vi n) { return (vf)((vu)(n + 127) << 23); }

// e^v within 1.1 ulp for every float, subnormal results included; NaN stays NaN.
static inline vf exp(vf v) {
    // Beyond these limits the result is infinity or 0 in any case; comparisons with NaN are false.
    v = v > splat(89.0f) ? splat(89.0f) : v;
    v = v < splat(-104.0f) ? splat(-104.0f) : v;
    // v = n ln 2 + r.
    const vf scaled = v * splat(0x1.715476p0f), whole = whole_float(scaled);
    // The high part of ln 2 has 15 bits: its products with n are exact.
    const vf r = (v - whole * splat(0x1.62e4p-1f)) - whole * splat(0x1.7f7d1cp-20f);
    // e^r = 1 + r + r^2 q(r) for |r| <= ln(2) / 2: q is minimax, with a relative error of 4.2e-9 in e^r.
    vf q = splat(0x1.6a2256p-10f);
    q = q * r + splat(0x1.123b02p-7f);
    q = q * r + splat(0x1.5558f8p-5f);
    q = q * r + splat(0x1.555490p-3f);
    q = q * r + splat(0x1.fffffcp-2f);
    const vf power = (q * r * r + r) + splat(1.0f);
    // In two steps, because 2^128 and 2^-150 are not floats.
    const vi n = whole_int(scaled), half = n >> 1;
    return power * power_of_two(half) * power_of_two(n - half);
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
