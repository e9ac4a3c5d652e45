#include "../common/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// skip + gate * x for the channels of one pixel.
template <typename T>
void merge_pixel(const T* x, const T* skip, const float* gate, T* out, int64_t c) {
    int64_t i = 0;
    for (; i + kLanes <= c; i += kLanes) {
        const vf g = gate ? load(gate + i) : splat(1);
        store(out + i, load(skip + i) + g * load(x + i));
    }
    for (; i < c; ++i) {
        store_one(out + i, load_one(skip + i) + (gate ? gate[i] : 1) * load_one(x + i));
    }
}

template <typename T>
void run(const UpsampleAdd& a) {
    const int64_t row = 2 * a.w * a.c;
    parallel_for(a.threads, a.n * a.h, [&](int64_t task) {
        const T* x = static_cast<const T*>(a.x) + task * a.w * a.c;
        const float* gate = a.gate ? a.gate + task / a.h * a.c : nullptr;
        for (int64_t dy = 0; dy < 2; ++dy) {
            const int64_t at = (2 * task + dy) * row;
            const T* skip = static_cast<const T*>(a.skip) + at;
            T* out = static_cast<T*>(a.out) + at;
            for (int64_t j = 0; j < 2 * a.w; ++j) {
                merge_pixel(x + j / 2 * a.c, skip + j * a.c, gate, out + j * a.c, a.c);
            }
        }
    });
}

}  // namespace

void upsample_add(const UpsampleAdd& args) {
    if (args.dtype == DType::f32) {
        run<float>(args);
    } else {
        run<bf16>(args);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
