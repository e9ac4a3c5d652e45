// Loads and stores of uint8 activations.
#pragma once

#include "vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace shelfkern {
namespace SHELFKERN_ISA {

// Compilers convert between bytes and 32-bit lanes one by one: 50 instructions instead of one.
static inline vf load(const uint8_t* p) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
#else
    return __builtin_convertvector(__builtin_convertvector(load_vector<vb>(p), vi), vf);
#endif
}
static inline float load_one(const uint8_t* p) { return *p; }

// Rounds to nearest, ties to even, clamped to [0, 255]; NaN becomes 0.
static inline void store(uint8_t* p, vf v) {
#if defined(__AVX512F__)
    // Values too large for an int32 become 2^31, which also saturates.
    const __m512i whole = _mm512_cvtps_epi32(_mm512_max_ps((__m512)v, _mm512_setzero_ps()));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(whole));
#elif defined(__AVX2__)
    const __m256 low = _mm256_max_ps((__m256)v, _mm256_setzero_ps());
    const __m256i whole = _mm256_cvtps_epi32(_mm256_min_ps(low, _mm256_set1_ps(255)));
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
    const vf high = splat(255), zero = {};
    v = v > zero ? v : zero;
    v = v < high ? v : high;
    const vu bits = whole_bits(v);
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(bits[i]);
#endif
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
