// The bilinear resize shared by upsample_bilinear, upsample_argmax and upsample_softmax_sum.
//
// A result row is computed in two steps: the two source rows are blended once, class by class, into a short
// row; then each vector of adjacent result pixels selects its sources from a few consecutive floats of that
// row by an in-register permutation.
#pragma once

#include <algorithm>

#include "../common/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// Where one result coordinate reads: source `first` and the next one, which has weight `fraction`.
struct Tap {
    int64_t first, next;
    float fraction;
};

// The coordinates that torch.nn.functional.interpolate uses, computed in float32 as it does.
static inline Tap tap(int64_t i, int64_t extent, int64_t full, bool align_corners) {
    if (extent == full) return {i, i, 0};
    float source;
    if (align_corners) {
        const float step = full > 1 ? static_cast<float>(extent - 1) / static_cast<float>(full - 1) : 0;
        source = step * static_cast<float>(i);
    } else {
        const float step = static_cast<float>(extent) / static_cast<float>(full);
        source = step * (static_cast<float>(i) + 0.5f) - 0.5f;
        source = source < 0 ? 0 : source;
    }
    int64_t first = static_cast<int64_t>(source);
    first = first < extent - 1 ? first : extent - 1;
    const float fraction = source - static_cast<float>(first);
    return {first, first + 1 < extent ? first + 1 : first, fraction < 1 ? fraction : 1};
}

// In torch's form, so that infinities meet the same zeros.
template <typename V>
static inline V blend(V from, V to, V fraction) {
    return from * (1 - fraction) + to * fraction;
}

// The horizontal taps of one vector of result pixels.
struct Columns {
    vi first, next;  // lanes of the kLanes floats from `base`
    vf fraction;
    int64_t base;
    bool narrow;  // whether kLanes floats contain all of them
};

// The taps of a whole row, as vectors and one by one.
struct ColumnTaps {
    Columns* columns;
    int64_t *first, *next;
};

// For results [0, count), the last vector repeating its last one: tap_of(x) is where result x reads.
template <typename TapOf>
static inline void make_columns(int64_t count, const TapOf& tap_of, const ColumnTaps& taps) {
    for (int64_t begin = 0; begin < count; begin += kLanes) {
        Columns& column = taps.columns[begin / kLanes];
        int64_t *const first = taps.first + begin, *const next = taps.next + begin;
        for (int lane = 0; lane < kLanes; ++lane) {
            const Tap t = tap_of(begin + lane < count ? begin + lane : count - 1);
            first[lane] = t.first;
            next[lane] = t.next;
            column.fraction[lane] = t.fraction;
        }
        column.base = *std::min_element(first, first + kLanes);
        column.narrow = *std::max_element(next, next + kLanes) - column.base < kLanes;
        for (int lane = 0; lane < kLanes; ++lane) {
            column.first[lane] = static_cast<int32_t>(first[lane] - column.base);
            column.next[lane] = static_cast<int32_t>(next[lane] - column.base);
        }
    }
}

// As above, in the given slot of this thread's scratch memory.
template <typename TapOf>
static inline ColumnTaps make_column_taps(int64_t count, const TapOf& tap_of, int slot) {
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    const int64_t column_bytes = vectors * static_cast<int64_t>(sizeof(Columns));
    const int64_t index_bytes = vectors * kLanes * 8;
    char* memory = static_cast<char*>(thread_scratch(slot, column_bytes + 2 * index_bytes));
    const ColumnTaps taps = {reinterpret_cast<Columns*>(memory),
                             reinterpret_cast<int64_t*>(memory + column_bytes),
                             reinterpret_cast<int64_t*>(memory + column_bytes + index_bytes)};
    make_columns(count, tap_of, taps);
    return taps;
}

// Column taps for the pixels of a resize's rows.
static inline ColumnTaps make_column_taps(const Resize& a, int slot) {
    const auto tap_of = [&](int64_t x) {
        return tap(a.mirror ? a.full_w - 1 - x : x, a.w, a.full_w, a.align_corners);
    };
    return make_column_taps(a.out_w, tap_of, slot);
}

static inline vf gather(const float* row, const int64_t* index) {
    vf v;
    for (int lane = 0; lane < kLanes; ++lane) v[lane] = row[index[lane]];
    return v;
}

// kLanes result pixels of one class from its blended row. The row must be readable for kLanes floats
// beyond its end.
static inline vf resize_columns(const float* row, const Columns& column, const int64_t* first,
                                const int64_t* next) {
    vf left, right;
    if (column.narrow) {
        const vf near = load(row + column.base);
        left = __builtin_shuffle(near, column.first);
        right = __builtin_shuffle(near, column.next);
    } else {
        left = gather(row, first);
        right = gather(row, next);
    }
    return blend(left, right, column.fraction);
}

// Floats between the blended rows of two classes.
static inline int64_t blended_stride(const Resize& a) { return (a.w + kLanes + 15) / 16 * 16; }

// Blends two source rows (w c) into c rows of w floats.
template <typename T>
static void blend_rows(const Resize& a, const T* scores, int64_t n, int64_t y, float* blended) {
    const Tap t = tap(y, a.h, a.full_h, a.align_corners);
    const T* top = scores + (n * a.h + t.first) * a.w * a.c;
    const T* bottom = scores + (n * a.h + t.next) * a.w * a.c;
    const int64_t stride = blended_stride(a);
    for (int64_t x = 0; x < a.w; ++x) {
        for (int64_t k = 0; k < a.c; ++k) {
            const float from = load_one(top + x * a.c + k), to = load_one(bottom + x * a.c + k);
            blended[k * stride + x] = blend(from, to, t.fraction);
        }
    }
}

// Result rows per task.
constexpr int64_t kRowsPerTask = 8;

// Calls row(n, y, blended, columns, first, next) for every result row, in parallel.
template <typename T, typename Row>
static void for_each_row(const Resize& a, const Row& row) {
    const ColumnTaps taps = make_column_taps(a, 0);
    const int64_t pieces = (a.out_h + kRowsPerTask - 1) / kRowsPerTask;
    const int64_t blended_bytes = a.c * blended_stride(a) * 4;
    parallel_for(a.threads, a.n * pieces, [&](int64_t task) {
        const int64_t n = task / pieces, begin = task % pieces * kRowsPerTask;
        float* blended = static_cast<float*>(thread_scratch(1, blended_bytes));
        for (int64_t y = begin; y < begin + kRowsPerTask && y < a.out_h; ++y) {
            blend_rows(a, static_cast<const T*>(a.scores), n, y, blended);
            row(n, y, blended, taps.columns, taps.first, taps.next);
        }
    });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
