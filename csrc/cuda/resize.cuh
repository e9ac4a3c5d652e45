// The source positions that the pixels of a bilinear resize read.
#pragma once

#include <algorithm>
#include <limits>

#include "primitives.cuh"

namespace shelfkern {
namespace cuda {

constexpr float kLargestFloat = std::numeric_limits<float>::max();

// Rows, or columns: `extent` source positions become `full`, then are flipped if `mirror`.
struct Axis {
    int extent, full;
    float step;  // distance in the source per position in the result
    bool align_corners, mirror;

    // The most source positions read by `count` adjacent result positions, including one for rounding.
    int64_t reach(int count) const {
        return std::min<int64_t>(extent, static_cast<int64_t>(step * static_cast<float>(count - 1)) + 4);
    }
};

inline Axis make_axis(int64_t extent, int64_t full, bool align_corners, bool mirror = false) {
    float step = static_cast<float>(extent) / static_cast<float>(full);
    if (align_corners) step = full > 1 ? static_cast<float>(extent - 1) / static_cast<float>(full - 1) : 0;
    return {static_cast<int>(extent), static_cast<int>(full), step, align_corners, mirror};
}

// Source `first` and the next one, which has weight `fraction`.
struct Tap {
    int first, next;
    float fraction;
};

// The coordinates that torch.nn.functional.interpolate uses, computed in float32 as it does.
DEVICE Tap tap(const Axis& axis, int i) {
    if (axis.mirror) i = axis.full - 1 - i;
    if (axis.extent == axis.full) return {i, i, 0};
    const float at = static_cast<float>(i);
    const float source = axis.align_corners ? axis.step * at : fmaxf(axis.step * (at + 0.5f) - 0.5f, 0);
    const int first = min(static_cast<int>(source), axis.extent - 1);
    return {first, min(first + 1, axis.extent - 1), fminf(source - static_cast<float>(first), 1)};
}

DEVICE float blend(float from, float to, float fraction) { return from * (1 - fraction) + to * fraction; }

// One pixel of the result, read from global memory one class at a time.
template <typename T>
struct Pixel {
    Global<const T> scores;
    int64_t corner[2][2];  // indices of the four sources' first class
    float y, x;            // weights of the second row and column

    DEVICE float value(int k) const {
        const auto at = [&](int i, int j) { return widen(scores.load(corner[i][j] + k)); };
        return blend(blend(at(0, 0), at(0, 1), x), blend(at(1, 0), at(1, 1), x), y);
    }
};

template <typename T>
DEVICE Pixel<T> pixel(const View<const T>& scores, int image, const Tap& y, const Tap& x) {
    return {scores.data,
            {{scores.offset(image, y.first, x.first), scores.offset(image, y.first, x.next)},
             {scores.offset(image, y.next, x.first), scores.offset(image, y.next, x.next)}},
            y.fraction,
            x.fraction};
}

}  // namespace cuda
}  // namespace shelfkern
