// Codes of 8 bits from floats.
#pragma once

#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The nearest codes of `count` values, ties to even; NaN becomes 0.
static inline void store_codes(int8_t* p, vf v, int count) {
    const vf low = splat(-128), high = splat(127), zero = {};
    v = v == v ? v : zero;
    v = v < low ? low : v > high ? high : v;
    // The sum's last bits are the whole number.
    const vu bits = (vu)(v + splat(12582912));
    if (count == kLanes) {
        const vb bytes = __builtin_convertvector(bits, vb);
        std::memcpy(p, &bytes, kLanes);
        return;
    }
    uint32_t lanes[kLanes];
    std::memcpy(lanes, &bits, sizeof(bits));
    for (int i = 0; i < count; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
