// The bilinear resize seen from its source: which full-size coordinates read a low-resolution one.
#pragma once

#include "resize.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The full-size coordinates from `begin` that read one low-resolution coordinate; weights start at `at`.
struct Support {
    int64_t begin, count, at;
};

// Supports of a whole axis, in the given slot of this thread's scratch memory.
struct Supports {
    Support* of;
    float* weights;
};

// For the first `shown` of `full` coordinates. Zero weights at the ends are dropped, because they would meet
// non-finite gradients.
static inline Supports make_supports(int slot, int64_t extent, int64_t full, int64_t shown,
                                     bool align_corners) {
    const int64_t bytes = extent * static_cast<int64_t>(sizeof(Support));
    char* memory = static_cast<char*>(thread_scratch(slot, bytes + 2 * shown * 4));
    const Supports supports = {reinterpret_cast<Support*>(memory), reinterpret_cast<float*>(memory + bytes)};
    for (int64_t i = 0; i < extent; ++i) supports.of[i] = {0, 0, 0};
    const auto visit = [&](const auto& add) {
        for (int64_t at = 0; at < shown; ++at) {
            const Tap t = tap(at, extent, full, align_corners);
            // At an edge both taps are the same coordinate.
            const float second = t.next == t.first ? 0 : t.fraction;
            if (second < 1) add(supports.of[t.first], at, 1 - second);
            if (second > 0) add(supports.of[t.next], at, second);
        }
    };
    visit([](Support& support, int64_t at, float) {
        if (support.count == 0) support.begin = at;
        support.count = at + 1 - support.begin;
    });
    int64_t total = 0;
    for (int64_t i = 0; i < extent; ++i) {
        supports.of[i].at = total;
        total += supports.of[i].count;
    }
    visit([&](Support& support, int64_t at, float weight) {
        supports.weights[support.at + at - support.begin] = weight;
    });
    return supports;
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
