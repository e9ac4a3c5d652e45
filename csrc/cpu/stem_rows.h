// Rows of an image as the stem's convolution sees them: normalised, padded and, if requested, resized.
#pragma once

#include <algorithm>

#include "dtypes.h"
#include "resize.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

static inline bool enlarges(const Stem& a) { return a.padded_h != a.h || a.padded_w != a.w; }

// Taps of the colours of a resized row's pixels, in this thread's scratch memory; empty where the image is
// not resized.
static inline ColumnTaps stem_taps(const Stem& a, int slot) {
    if (!enlarges(a)) return {};
    const auto tap_of = [&](int64_t i) {
        const Tap t = tap(i / 3, a.padded_w, a.w, false);
        return Tap{3 * t.first + i % 3, 3 * t.next + i % 3, t.fraction};
    };
    return make_column_taps(3 * a.w, tap_of, slot);
}

class StemRows {
   public:
    const Stem& of;
    const bool enlarged;
    const int64_t rows, columns;  // without the zero padding

    // For image n. Uses scratch slots 4 and 5.
    StemRows(const Stem& a, const ColumnTaps& taps, int64_t n)
        : of(a),
          enlarged(enlarges(a)),
          rows(enlarged ? a.h : a.image_h),
          columns(enlarged ? a.w : a.image_w),
          taps_(taps),
          n_(n) {
        if (!enlarged) return;
        given_ = static_cast<float*>(thread_scratch(4, (3 * a.padded_w + kLanes) * 4));
        std::fill(given_ + 3 * a.image_w, given_ + 3 * a.padded_w, 0.f);
        const int64_t wide = (3 * a.w + kLanes - 1) / kLanes * kLanes;
        float* memory = static_cast<float*>(thread_scratch(5, 2 * wide * 4));
        for (int i = 0; i < 2; ++i) widened_[i] = {memory + i * wide, -1};
    }

    // Pixels of row y as given, if they are 8-bit; else null.
    const uint8_t* raw(int64_t y) const {
        if (of.image_dtype != DType::u8 || enlarged) return nullptr;
        return static_cast<const uint8_t*>(of.image) + (n_ * of.image_h + y) * of.image_w * 3;
    }

    // The first `count` pixels of row y as normalised float32 RGB.
    void read(int64_t y, int64_t count, float* to) {
        if (!enlarged) return read_given(y, count, to);
        const Tap t = tap(y, of.padded_h, of.h, false);
        const float *const top = widened(t.first), *const bottom = widened(t.next);
        const vf fraction = splat(t.fraction);
        for (int64_t i = 0; i < 3 * count; i += kLanes) {
            const int some = static_cast<int>(std::min<int64_t>(3 * count - i, kLanes));
            store_up_to(to + i, blend(load(top + i), load(bottom + i), fraction), some);
        }
    }

   private:
    struct Widened {
        float* row;
        int64_t y;
    };

    ColumnTaps taps_;
    int64_t n_;
    float* given_ = nullptr;
    // Two adjacent rows have one even and one odd index: both are kept for the rows that follow.
    Widened widened_[2];

    void read_given(int64_t y, int64_t count, float* to) const {
        if (of.image_dtype == DType::u8) {
            const uint8_t* from =
                static_cast<const uint8_t*>(of.image) + (n_ * of.image_h + y) * of.image_w * 3;
            for (int64_t x = 0; x < count; ++x) {
                for (int64_t k = 0; k < 3; ++k) to[3 * x + k] = of.values[3 * from[3 * x + k] + k];
            }
            return;
        }
        with_type<float, bf16>(of.image_dtype, [&](auto t) {
            for (int64_t k = 0; k < 3; ++k) {
                const int64_t row = (n_ * 3 + k) * of.image_h + y;
                const auto* plane = static_cast<const decltype(t)*>(of.image) + row * of.image_w;
                for (int64_t x = 0; x < count; ++x) to[3 * x + k] = load_one(plane + x);
            }
        });
    }

    // Row y of the padded image, resized to the full width.
    const float* widened(int64_t y) {
        Widened& kept = widened_[y & 1];
        if (kept.y == y) return kept.row;
        kept.y = y;
        if (y >= of.image_h) {
            std::fill(kept.row, kept.row + 3 * of.w, 0.f);
            return kept.row;
        }
        read_given(y, of.image_w, given_);
        for (int64_t i = 0; i < 3 * of.w; i += kLanes) {
            const Columns& columns = taps_.columns[i / kLanes];
            store(kept.row + i, resize_columns(given_, columns, taps_.first + i, taps_.next + i));
        }
        return kept.row;
    }
};

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
