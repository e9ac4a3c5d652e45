#include "dtypes.h"
#include "resize.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// The first class with the largest value, for kLanes pixels; NaN counts as largest, as in torch.
vi best_class(const Resize& a, const float* blended, const Columns& column, const int64_t* first,
              const int64_t* next) {
    const int64_t stride = blended_stride(a);
    vf best = resize_columns(blended, column, first, next);
    vi label = {};
    for (int64_t k = 1; k < a.c; ++k) {
        const vf value = resize_columns(blended + k * stride, column, first, next);
        const vi better = (value > best) | ((value != value) & (best == best));
        best = better ? value : best;
        label = better ? vi{} + static_cast<int32_t>(k) : label;
    }
    return label;
}

template <typename T>
void run(const Resize& a) {
    for_each_row<T>(a, [&](int64_t n, int64_t y, const float* blended, const Columns* columns,
                           const int64_t* first, const int64_t* next) {
        uint8_t* out = static_cast<uint8_t*>(a.out) + (n * a.out_h + y) * a.out_w;
        for (int64_t at = 0; at < a.out_w; at += kLanes) {
            const vi label = best_class(a, blended, columns[at / kLanes], first + at, next + at);
            const vb bytes = __builtin_convertvector(label, vb);
            const int64_t count = a.out_w - at < kLanes ? a.out_w - at : kLanes;
            __builtin_memcpy(out + at, &bytes, static_cast<size_t>(count));
        }
    });
}

}  // namespace

void upsample_argmax(const Resize& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
