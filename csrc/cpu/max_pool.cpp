#include "../common/parallel.h"
#include "dtypes.h"
#include "partial.h"
#include "spans.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int64_t kSide = 3;

// Taps of the 3-wide window from 2 * at - 1 that lie within an axis.
Span taps_within(int64_t at, int64_t size) { return {at == 0 ? 1 : 0, min(kSide, size - 2 * at + 1)}; }

// Calls body(first, count) for the vectors of `channels`, with a count known to the compiler for all but a
// partial last one.
template <typename Body>
inline __attribute__((always_inline)) void each_vector(int64_t channels, const Body& body) {
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) body(i, kLanes);
    if (i < channels) body(i, static_cast<int>(channels - i));
}

// The largest value of a window, the last NaN if there is any, and its tap.
struct Largest {
    vf value;
    vi tap;

    void meet(vf v, int64_t at) {
        const vi better = (v > value) | (v != v);
        value = better ? v : value;
        tap = better ? vi{} + static_cast<int32_t>(at) : tap;
    }
};

// Of a window whose tap (0, 0) is at `from`, the taps within the image. Unrolled for whole windows.
template <typename T>
inline __attribute__((always_inline)) Largest largest_of(const T* from, int64_t row, int64_t pixel, Span rows,
                                                         Span columns, int count) {
    const int64_t first = rows.begin * kSide + columns.begin;
    Largest found{load_up_to(from + rows.begin * row + columns.begin * pixel, count),
                  vi{} + static_cast<int32_t>(first)};
#pragma GCC unroll 3
    for (int64_t r = rows.begin; r < rows.end; ++r) {
#pragma GCC unroll 3
        for (int64_t s = columns.begin; s < columns.end; ++s) {
            if (r * kSide + s == first) continue;
            found.meet(load_up_to(from + r * row + s * pixel, count), r * kSide + s);
        }
    }
    return found;
}

template <typename T>
void pool_row(const MaxPool& a, int64_t task) {
    const int64_t out_h = divide_up(a.h, 2), out_w = divide_up(a.w, 2), y = task % out_h, row = a.w * a.c;
    const T* first = static_cast<const T*>(a.x) + (task / out_h * a.h + 2 * y - 1) * row - a.c;
    const Span rows = taps_within(y, a.h), all{0, kSide};
    for (int64_t x = 0; x < out_w; ++x) {
        const Span columns = taps_within(x, a.w);
        const bool whole = rows.count() == kSide && columns.count() == kSide;
        const T* from = first + 2 * x * a.c;
        const int64_t to = (task * out_w + x) * a.c;
        each_vector(a.c, [&](int64_t i, int count) {
            const Largest found = whole ? largest_of(from + i, row, a.c, all, all, count)
                                        : largest_of(from + i, row, a.c, rows, columns, count);
            store_up_to(static_cast<T*>(a.out) + to + i, found.value, count);
            const vb taps = __builtin_convertvector(found.tap, vb);
            std::memcpy(a.taps + to + i, &taps, static_cast<size_t>(count));
        });
    }
}

// Up to a vector of a window's gradient, and the taps that it goes to.
struct Gradient {
    vf value = {};
    vi tap = vi{} - 1;

    vf at(int tap_of_pixel) const { return tap == vi{} + tap_of_pixel ? value : vf{}; }
};

template <typename T>
inline __attribute__((always_inline)) Gradient gradient_of(const MaxPoolBackward& a, int64_t at, int count) {
    vb taps = {};
    std::memcpy(&taps, a.taps + at, static_cast<size_t>(count));
    return {load_up_to(static_cast<const T*>(a.grad) + at, count), __builtin_convertvector(taps, vi)};
}

// Two rows of the gradient of x, in squares of 2 x 2 pixels: each meets the window that it is the centre of,
// those to the right and below, and the one to the right below. Summed in the order of the windows.
template <typename T>
void gradient_rows(const MaxPoolBackward& a, int64_t task) {
    const int64_t out_h = divide_up(a.h, 2), out_w = divide_up(a.w, 2), y = task % out_h, row = a.w * a.c;
    T* to = static_cast<T*>(a.grad_x) + (task / out_h * a.h + 2 * y) * row;
    const bool below = y + 1 < out_h, second_row = 2 * y + 1 < a.h;
    for (int64_t x = 0; x < out_w; ++x, to += 2 * a.c) {
        const bool right = x + 1 < out_w, second_column = 2 * x + 1 < a.w;
        const int64_t window = (task * out_w + x) * a.c, next = window + out_w * a.c;
        each_vector(a.c, [&](int64_t i, int count) {
            const Gradient centre = gradient_of<T>(a, window + i, count);
            const Gradient beside = right ? gradient_of<T>(a, window + a.c + i, count) : Gradient{};
            const Gradient under = below ? gradient_of<T>(a, next + i, count) : Gradient{};
            const Gradient last = below && right ? gradient_of<T>(a, next + a.c + i, count) : Gradient{};
            store_up_to(to + i, centre.at(4), count);
            if (second_column) store_up_to(to + a.c + i, centre.at(5) + beside.at(3), count);
            if (second_row) store_up_to(to + row + i, centre.at(7) + under.at(1), count);
            if (second_row && second_column) {
                const vf sum = centre.at(8) + beside.at(6) + under.at(2) + last.at(0);
                store_up_to(to + row + a.c + i, sum, count);
            }
        });
    }
}

}  // namespace

void max_pool(const MaxPool& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) {
        parallel_for(args.threads, args.n * divide_up(args.h, 2),
                     [&](int64_t task) { pool_row<decltype(t)>(args, task); });
    });
}

void max_pool_backward(const MaxPoolBackward& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) {
        parallel_for(args.threads, args.n * divide_up(args.h, 2),
                     [&](int64_t task) { gradient_rows<decltype(t)>(args, task); });
    });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
