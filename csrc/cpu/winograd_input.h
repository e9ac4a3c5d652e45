// From pixels to V.
#pragma once

#include "winograd_layout.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The transform of `count` channels of one tile from channel `c`, up to kLanes, from the pixels of its window
// to what is behind `at`.
template <typename Filter, typename T>
static inline __attribute__((always_inline)) void transform_vector(const T* const* from, int64_t c, int count,
                                                                   int64_t at, float* const* to) {
    constexpr int kIn = Filter::kIn, kFrequencies = Filter::kFrequencies;
    vf half[kIn][kFrequencies];
#pragma GCC unroll 9
    for (int row = 0; row < kIn; ++row) {
        vf in[kIn];
#pragma GCC unroll 9
        for (int column = 0; column < kIn; ++column) {
            in[column] = load_up_to(from[row * kIn + column] + c, count);
        }
        Filter::input(in, half[row]);
    }
#pragma GCC unroll 9
    for (int column = 0; column < kFrequencies; ++column) {
        vf in[kIn], out[kFrequencies];
#pragma GCC unroll 9
        for (int row = 0; row < kIn; ++row) in[row] = half[row][column];
        Filter::input(in, out);
#pragma GCC unroll 9
        for (int row = 0; row < kFrequencies; ++row) store(to[row * kFrequencies + column] + at, out[row]);
    }
}

// V of some channels of some tiles; that of tile `first` is the first in `v`. Pixels beyond the image are one
// of zeros.
template <typename Filter, typename T>
static void transform_input(const Geometry<Filter>& g, Span tiles, Span channels,
                            const Layout<Filter>& layout, int64_t first, float* v) {
    constexpr int kIn = Filter::kIn;
    const Winograd& a = g.a;
    T* zeros = scratch<T>(kSlotZeros, a.c);
    for (int64_t c = 0; c < a.c; ++c) zeros[c] = T{};
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        const Place p = place_of(g, t);
        const T* image = static_cast<const T*>(a.x) + p.n * a.h * a.w * a.c;
        const T* from[kIn * kIn];
        for (int i = 0; i < kIn * kIn; ++i) {
            const int64_t y = p.in_y + i / kIn, x = p.in_x + i % kIn;
            from[i] = y >= 0 && y < a.h && x >= 0 && x < a.w ? image + (y * a.w + x) * a.c : zeros;
        }
        float* to[g.kFrequencies];
        layout.pointers(v, t - first, to);
        for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
            const int64_t at = c - channels.begin;
            if (c + kLanes <= channels.end) {
                transform_vector<Filter>(from, c, kLanes, at, to);
            } else {
                transform_vector<Filter>(from, c, static_cast<int>(channels.end - c), at, to);
            }
        }
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
