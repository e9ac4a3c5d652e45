#include "dtypes.h"
#include "resize.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

template <typename T>
void run(const Resize& a) {
    const int64_t stride = blended_stride(a), whole = a.out_w / kLanes;
    for_each_row<T>(a, [&](int64_t n, int64_t y, const float* blended, const Columns* columns,
                           const int64_t* first, const int64_t* next) {
        for (int64_t k = 0; k < a.c; ++k) {
            const float* row = blended + k * stride;
            T* out = static_cast<T*>(a.out) + ((n * a.c + k) * a.out_h + y) * a.out_w;
            for (int64_t v = 0; v < whole; ++v) {
                const int64_t at = v * kLanes;
                store(out + at, resize_columns(row, columns[v], first + at, next + at));
            }
            const int64_t at = whole * kLanes;
            if (at == a.out_w) continue;
            T lanes[kLanes];
            store(lanes, resize_columns(row, columns[whole], first + at, next + at));
            for (int64_t x = at; x < a.out_w; ++x) out[x] = lanes[x - at];
        }
    });
}

}  // namespace

void upsample_bilinear(const Resize& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
