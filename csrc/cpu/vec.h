// Vectors of the instruction set a file is compiled for, as compiler extensions, so that one source serves
// all; intrinsics only where compilers need several instructions instead of one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace shelfkern {
namespace SHELFKERN_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef int16_t vs __attribute__((vector_size(4 * kLanes)));  // two per float lane
typedef uint16_t vh __attribute__((vector_size(2 * kLanes)));
typedef uint8_t vb __attribute__((vector_size(kLanes)));

struct bf16 {
    uint16_t bits;
};

template <typename V>
static inline V load_vector(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

static inline vf splat(float s) {
#if defined(__AVX512F__)
    return vf{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
#elif defined(__AVX2__)
    return vf{s, s, s, s, s, s, s, s};
#else
    return vf{s, s, s, s};
#endif
}

static inline vu splat_word(uint32_t w) { return vu{} + w; }

static inline vf load(const float* p) { return load_vector<vf>(p); }
static inline vi load(const int32_t* p) { return load_vector<vi>(p); }
static inline vu load(const uint32_t* p) { return load_vector<vu>(p); }
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof(v)); }
static inline void store(int32_t* p, vi v) { std::memcpy(p, &v, sizeof(v)); }

// Between vectors a cast keeps the bits.
static inline vf load(const bf16* p) {
#if defined(__AVX512BW__)
    // One permutation with zeros, instead of widening and shifting.
    const __m512i halves = _mm512_castsi256_si512((__m256i)load_vector<vh>(p));
    const __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    return (vf)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_slli_epi32(at, 16), halves);
#elif defined(__AVX2__)
    // GCC 12 widens each half of the vector on its own, in five instructions.
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)load_vector<vh>(p)), 16);
#else
    return (vf)(__builtin_convertvector(load_vector<vh>(p), vu) << 16);
#endif
}

// Values below 2^16 as 16 bits.
static inline vh narrowed(vu v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = (__m256i)v;
    return (vh)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    return __builtin_convertvector(v, vh);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN. The instruction flushes values below 2^-126 to 0.
static inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
    const vu bits = (vu)v;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu nan = (bits >> 16) | 0x40;
    const vh half = narrowed(v == v ? rounded : nan);
#endif
    std::memcpy(p, &half, sizeof(half));
}

// 1.5 * 2^23: floats from 2^23 to 2^24 are integers, so adding this rounds to an integer.
constexpr float kAmongWholeNumbers = 12582912;

// Values from -2^22 to 2^22 rounded to the nearest integer, ties to even: in the low 22 bits, as a float, and
// as an integer.
static inline vu whole_bits(vf v) { return (vu)(v + splat(kAmongWholeNumbers)); }
static inline vf whole_float(vf v) { return (vf)whole_bits(v) - splat(kAmongWholeNumbers); }
static inline vi whole_int(vf v) { return (vi)whole_bits(v) - (vi)splat(kAmongWholeNumbers); }

static inline float load_one(const float* p) { return *p; }
static inline float load_one(const bf16* p) {
    const uint32_t bits = static_cast<uint32_t>(p->bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
}
static inline void store_one(float* p, float f) { *p = f; }
static inline void store_one(bf16* p, float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    p->bits = static_cast<uint16_t>(f == f ? rounded : (bits >> 16) | 0x40);
}

// relu for slope 0, leaky relu, no activation for slope 1; -inf and NaN as in torch.
static inline vf activate(vf v, float slope) {
    const vf zero = {};
    return zero > v ? (slope == 0 ? zero : v * splat(slope)) : v;
}
static inline float activate(float v, float slope) { return 0 > v ? (slope == 0 ? 0 : v * slope) : v; }

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
