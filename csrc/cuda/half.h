// 16-bit storage formats as raw bits, and packs of adjacent elements, identical on host and device.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace shelfkern {
namespace cuda {

struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

// N adjacent elements, aligned to the pack's size of 1, 2, 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T v[N];
    HOST_DEVICE T& operator[](int i) { return v[i]; }
    HOST_DEVICE const T& operator[](int i) const { return v[i]; }
};

HOST_DEVICE uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

HOST_DEVICE float float_of(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

HOST_DEVICE float widen(float v) { return v; }

HOST_DEVICE float widen(uint8_t v) { return v; }

HOST_DEVICE float widen(BF16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

HOST_DEVICE float widen(F16 v) {
#if defined(__CUDA_ARCH__)
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
    return f;
#else
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400) return float_of(sign | ((magnitude << 13) + (112u << 23)));
    // Subnormal: a multiple of 2^-24.
    return float_of(sign | bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
#endif
}

// Rounds to nearest, ties to even: narrow<T>(f).
template <typename T>
HOST_DEVICE T narrow(float f);

template <>
HOST_DEVICE float narrow<float>(float f) {
    return f;
}

template <>
HOST_DEVICE BF16 narrow<BF16>(float f) {
    BF16 out;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));
#else
    const uint32_t bits = bits_of(f);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = static_cast<uint16_t>(f == f ? rounded : 0x7fff);
#endif
    return out;
}

template <>
HOST_DEVICE F16 narrow<F16>(float f) {
    F16 out;
#if defined(__CUDA_ARCH__)
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(f));
#else
    const uint32_t bits = bits_of(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7fff;
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00;  // rounds to infinity
    } else if (magnitude >= 0x38800000) {
        half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {
        // Subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to even.
        half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    }
    out.bits = static_cast<uint16_t>(sign | half);
#endif
    return out;
}

// Two values as a matrix fragment's register holds them, lo in the low half.
template <typename T>
HOST_DEVICE uint32_t pack2(float lo, float hi) {
    return static_cast<uint32_t>(narrow<T>(hi).bits) << 16 | narrow<T>(lo).bits;
}

#if defined(__CUDA_ARCH__)
// One conversion instruction instead of the generic form's three.
template <>
HOST_DEVICE uint32_t pack2<BF16>(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}

template <>
HOST_DEVICE uint32_t pack2<F16>(float lo, float hi) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
    return out;
}
#endif

// The inverse of pack2.
template <typename T>
HOST_DEVICE Pack<float, 2> unpack2(uint32_t pair) {
    return {{widen(T{static_cast<uint16_t>(pair)}), widen(T{static_cast<uint16_t>(pair >> 16)})}};
}

// NaN is larger than any number, as in torch.
HOST_DEVICE float larger(float a, float b) { return b > a || b != b ? b : a; }

// The larger of each of two packed elements: one instruction instead of eight for separate numbers.
template <typename T>
HOST_DEVICE uint32_t larger2(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
    uint32_t out;
    if constexpr (std::is_same_v<T, BF16>) {
        asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    } else {
        asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
    }
    return out;
#else
    const Pack<float, 2> x = unpack2<T>(a), y = unpack2<T>(b);
    return pack2<T>(larger(x[0], y[0]), larger(x[1], y[1]));
#endif
}

}  // namespace cuda
}  // namespace shelfkern
