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

// The largest value of a window, the last NaN if there is any, and its tap, initially the first.
struct Largest {
    vf value = splat(-__builtin_inff());
    vi tap;

    explicit Largest(int64_t first) : tap(vi{} + static_cast<int32_t>(first)) {}

    void meet(vf v, int64_t at) {
        const vi better = (v > value) | (v != v);
        value = better ? v : value;
        tap = better ? vi{} + static_cast<int32_t>(at) : tap;
    }
};

template <typename T>
void pool_row(const MaxPool& a, int64_t task) {
    const int64_t out_h = divide_up(a.h, 2), out_w = divide_up(a.w, 2), y = task % out_h;
    const T* image = static_cast<const T*>(a.x) + task / out_h * a.h * a.w * a.c;
    const Span rows = taps_within(y, a.h);
    for (int64_t x = 0; x < out_w; ++x) {
        const Span columns = taps_within(x, a.w);
        const int64_t to = (task * out_w + x) * a.c;
        for (int64_t i = 0; i < a.c; i += kLanes) {
            const int count = static_cast<int>(min(kLanes, a.c - i));
            Largest largest(rows.begin * kSide + columns.begin);
            for (int64_t r = rows.begin; r < rows.end; ++r) {
                const T* from = image + ((2 * y - 1 + r) * a.w + 2 * x - 1) * a.c + i;
                for (int64_t s = columns.begin; s < columns.end; ++s) {
                    largest.meet(load_up_to(from + s * a.c, count), r * kSide + s);
                }
            }
            store_up_to(static_cast<T*>(a.out) + to + i, largest.value, count);
            const vb taps = __builtin_convertvector(largest.tap, vb);
            std::memcpy(a.taps + to + i, &taps, static_cast<size_t>(count));
        }
    }
}

// The windows that contain a position of an axis, and its tap in each.
struct Windows {
    int64_t at[2], tap[2], count = 0;

    Windows(int64_t position, int64_t out_size) {
        if (position % 2 == 0) {
            add(position / 2, 1);
        } else {
            add(position / 2, 2);
            if (position / 2 + 1 < out_size) add(position / 2 + 1, 0);
        }
    }

    void add(int64_t window, int64_t of) {
        at[count] = window;
        tap[count++] = of;
    }
};

vi load_taps(const uint8_t* p, int count) {
    vb taps = {};
    std::memcpy(&taps, p, static_cast<size_t>(count));
    return __builtin_convertvector(taps, vi);
}

template <typename T>
void gradient_row(const MaxPoolBackward& a, int64_t task) {
    const int64_t out_h = divide_up(a.h, 2), out_w = divide_up(a.w, 2), image = task / a.h * out_h;
    const Windows rows(task % a.h, out_h);
    for (int64_t x = 0; x < a.w; ++x) {
        const Windows columns(x, out_w);
        for (int64_t i = 0; i < a.c; i += kLanes) {
            const int count = static_cast<int>(min(kLanes, a.c - i));
            vf sum = {};
            for (int64_t r = 0; r < rows.count; ++r) {
                for (int64_t s = 0; s < columns.count; ++s) {
                    const int64_t at = ((image + rows.at[r]) * out_w + columns.at[s]) * a.c + i;
                    const vi tap = vi{} + static_cast<int32_t>(rows.tap[r] * kSide + columns.tap[s]);
                    const vf grad = load_up_to(static_cast<const T*>(a.grad) + at, count);
                    sum += load_taps(a.taps + at, count) == tap ? grad : vf{};
                }
            }
            store_up_to(static_cast<T*>(a.grad_x) + (task * a.w + x) * a.c + i, sum, count);
        }
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
        parallel_for(args.threads, args.n * args.h,
                     [&](int64_t task) { gradient_row<decltype(t)>(args, task); });
    });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
