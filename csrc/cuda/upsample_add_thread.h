// What one GPU thread of upsample_add does, compiled for the device and for the host.
#pragma once

#include <cstring>

#include "upsample_add.h"

#if defined(__CUDACC__)
#define SHELFKERN_HD __host__ __device__ __forceinline__
#else
#define SHELFKERN_HD inline
#endif

namespace shelfkern {
namespace cuda {

constexpr int kThreads = 256;

// 16-bit storage formats as raw bits, so that host and device convert alike.
struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

SHELFKERN_HD uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}
SHELFKERN_HD float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

SHELFKERN_HD float widen(float v) { return v; }
SHELFKERN_HD float widen(BF16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }
SHELFKERN_HD float widen(F16 v) {
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    // Subnormal: a multiple of 2^-24.
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}

SHELFKERN_HD void narrow(float f, float& out) { out = f; }
SHELFKERN_HD void narrow(float f, BF16& out) {
    const uint32_t bits = bits_of(f);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>(f == f ? rounded : (bits >> 16) | 0x40);
}
SHELFKERN_HD void narrow(float f, F16& out) {
    const uint32_t bits = bits_of(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00;  // rounds to infinity
    } else if (magnitude >= 0x38800000) {
        half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {
        // Subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to even.
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    }
    out.bits = static_cast<uint16_t>(sign | half);
}

// A thread's share: kVector neighbouring channels of one output pixel; 16 bytes where c allows.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
    T v[kVector];
};

template <typename T, int kVector>
SHELFKERN_HD void upsample_add_thread(const UpsampleAdd& a, int64_t thread) {
    const int64_t packs = a.c / kVector;
    if (thread >= a.n * 4 * a.h * a.w * packs) return;
    const int64_t pixel = thread / packs, channel = thread % packs * kVector;
    const int64_t out_x = pixel % (2 * a.w), row = pixel / (2 * a.w);
    const int64_t out_y = row % (2 * a.h), image = row / (2 * a.h);
    const int64_t source = ((image * a.h + out_y / 2) * a.w + out_x / 2) * a.c + channel;
    using P = Pack<T, kVector>;
    const P x = *reinterpret_cast<const P*>(static_cast<const T*>(a.x) + source);
    const P skip = *reinterpret_cast<const P*>(static_cast<const T*>(a.skip) + pixel * a.c + channel);
    P out;
    for (int i = 0; i < kVector; ++i) {
        const float gate = a.gate ? a.gate[image * a.c + channel + i] : 1.0f;
        narrow(widen(skip.v[i]) + gate * widen(x.v[i]), out.v[i]);
    }
    *reinterpret_cast<P*>(static_cast<T*>(a.out) + pixel * a.c + channel) = out;
}

// Whether every pixel's channels are whole, aligned packs.
inline bool packs_fit(const UpsampleAdd& a, int64_t pack_bytes, int64_t vector) {
    const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % pack_bytes != 0; };
    return a.c % vector == 0 && !misaligned(a.x) && !misaligned(a.skip) && !misaligned(a.out);
}

// Calls run.template operator()<T, kVector>() for the arguments' type and widest pack.
template <typename T, typename Run>
void with_pack(const UpsampleAdd& a, const Run& run) {
    constexpr int kVector = 16 / sizeof(T);
    if (packs_fit(a, 16, kVector)) {
        run(Pack<T, kVector>{});
    } else {
        run(Pack<T, 1>{});
    }
}

template <typename Run>
void with_type(const UpsampleAdd& a, const Run& run) {
    switch (a.dtype) {
        case DType::f32:
            return with_pack<float>(a, run);
        case DType::bf16:
            return with_pack<BF16>(a, run);
        case DType::f16:
            return with_pack<F16>(a, run);
    }
}

template <int kVector>
int64_t blocks(const UpsampleAdd& a) {
    return (a.n * 4 * a.h * a.w * (a.c / kVector) + kThreads - 1) / kThreads;
}

}  // namespace cuda
}  // namespace shelfkern
