#include "../common/parallel.h"
#include "codes.h"
#include "dtypes.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// skip + gate * x for the channels of one pixel.
template <typename T>
void merge_pixel(const UpsampleAdd&, const T* x, const T* skip, const float* gate, T* out, int64_t c) {
    int64_t i = 0;
    for (; i + kLanes <= c; i += kLanes) {
        const vf g = gate ? load(gate + i) : splat(1);
        store(out + i, load(skip + i) + g * load(x + i));
    }
    for (; i < c; ++i) {
        store_one(out + i, load_one(skip + i) + (gate ? gate[i] : 1) * load_one(x + i));
    }
}

vf merge_codes(const UpsampleAdd& a, vf x, vf skip, vf gate) {
    const vf scale = gate * splat(a.x_scale);
    return skip * splat(a.skip_scale) + (x - splat(a.x_zero)) * scale + splat(a.bias);
}

void merge_pixel(const UpsampleAdd& a, const uint8_t* x, const uint8_t* skip, const float* gate, uint8_t* out,
                 int64_t c) {
    int64_t i = 0;
    for (; i + kLanes <= c; i += kLanes) {
        store(out + i, merge_codes(a, load(x + i), load(skip + i), gate ? load(gate + i) : splat(1)));
    }
    for (; i < c; ++i) {
        uint8_t code[kLanes];
        store(code, merge_codes(a, splat(x[i]), splat(skip[i]), splat(gate ? gate[i] : 1)));
        out[i] = code[0];
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
                merge_pixel(a, x + j / 2 * a.c, skip + j * a.c, gate, out + j * a.c, a.c);
            }
        }
    });
}

}  // namespace

void upsample_add(const UpsampleAdd& args) {
    with_type<float, bf16, uint8_t>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
