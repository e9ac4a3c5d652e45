// Products of 32-bit words, the inner step of convolutions: one word of the input, holding one float, two
// bfloat16, two int16 or four uint8 values, times a word of weights in every lane, added to the lanes' sums.
//
// Each runs on every instruction set; without dedicated instructions it takes several.
#pragma once

#include "vec.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace shelfkern {
namespace SHELFKERN_ISA {

// One float32.
struct Float32 {
    using Word = float;
    using Weights = vf;
    using Scalar = float;
    using Sum = vf;
    static constexpr int kElements = 1;

    static inline __attribute__((always_inline)) vf add(vf sum, float x, vf w) { return sum + splat(x) * w; }
};

// Two bfloat16, the first in the low half.
struct Bfloat16 {
    using Word = uint32_t;
    using Weights = vu;
    using Scalar = float;
    using Sum = vf;
    static constexpr int kElements = 2;

    static inline __attribute__((always_inline)) vf add(vf sum, uint32_t x, vu w) {
#if defined(__AVX512BF16__)
        return _mm512_dpbf16_ps(sum, (__m512bh)splat_word(x), (__m512bh)w);
#else
        const vf low = (vf)splat_word(x << 16), high = (vf)splat_word(x & 0xffff0000);
        return sum + low * (vf)(w << 16) + high * (vf)(w & 0xffff0000);
#endif
    }
};

// Sum of two 16-bit products in every lane.
static inline vi dot(vs a, vs b) {
#if defined(__AVX512BW__)
    return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const vi x = (vi)a, y = (vi)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

// Two int16, the first in the low half.
struct Int16 {
    using Word = uint32_t;
    using Weights = vu;
    using Scalar = int32_t;
    using Sum = vi;
    static constexpr int kElements = 2;

    static inline __attribute__((always_inline)) vi add(vi sum, uint32_t x, vu w) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)splat_word(x), (__m512i)w);
#else
        return sum + dot((vs)splat_word(x), (vs)w);
#endif
    }
};

// Four 8-bit values: inputs from 0 to 255, weights from -128 to 127.
struct Int8 {
    using Word = uint32_t;
    using Weights = vu;
    using Scalar = int32_t;
    using Sum = vi;
    static constexpr int kElements = 4;

    static inline __attribute__((always_inline)) vi add(vi sum, uint32_t x, vu w) {
#if defined(__AVX512VNNI__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)splat_word(x), (__m512i)w);
#else
        // 16-bit products do not saturate, unlike 8-bit ones: bytes 0 and 2, then 1 and 3.
        const vs even = (vs)(w << 8) >> 8, odd = (vs)w >> 8;
        sum += dot((vs)splat_word(x & 0x00ff00ff), even);
        return sum + dot((vs)splat_word(x >> 8 & 0x00ff00ff), odd);
#endif
    }
};

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
