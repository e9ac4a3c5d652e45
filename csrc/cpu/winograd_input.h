// The input transform: from pixels to V.
#pragma once

#include "winograd_filters.h"
#include "winograd_layout.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The pixels of a tile's window. `zero` is the zero point of uint8 pixels.
template <typename T, int kPixels>
struct Pixels {
    const T* at[kPixels];
    int zero;

    // Up to kLanes channels of one pixel.
    inline __attribute__((always_inline)) vf values(int pixel, int64_t c, int count) const {
        const vf v = load_up_to(at[pixel] + c, count);
        return std::is_same<T, uint8_t>::value ? v - splat(static_cast<float>(zero)) : v;
    }
};

// The transform of `count` channels of one tile from channel `c`, up to kLanes. Calls put(frequency, values).
template <typename Filter, typename Window, typename Put>
static inline __attribute__((always_inline)) void transform_vector(const Window& window, int64_t c, int count,
                                                                   const Put& put) {
    constexpr int kIn = Filter::kIn, kFrequencies = Filter::kFrequencies;
    // Rows first, in the order of the pixels: columns in transform_square are rows of the window.
    transform_square<kIn, kFrequencies, Filter::input>(
        [&](int column, int row) { return window.values(row * kIn + column, c, count); },
        [&](int column, int row, vf v) { put(row * kFrequencies + column, v); });
}

// transform_vector for a range of channels.
template <typename Filter, typename Window, typename Put>
static inline __attribute__((always_inline)) void transform_channels(const Window& window, Span channels,
                                                                     const Put& put) {
    for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
        if (c + kLanes <= channels.end) {
            transform_vector<Filter>(window, c, kLanes, [&](int f, vf v) { put(c - channels.begin, f, v); });
        } else {
            const int count = static_cast<int>(channels.end - c);
            transform_vector<Filter>(window, c, count, [&](int f, vf v) { put(c - channels.begin, f, v); });
        }
    }
}

template <typename Filter, typename Window>
static void transform_tile(const Window& window, const Transformed<Filter>& v, int64_t tile) {
    for (int64_t i = 0; i < v.chunks; ++i) {
        float* to[Geometry<Filter>::kFrequencies];
        v.layout.pointers(v.chunk(i), tile, to);
        transform_channels<Filter>(window, v.channels(i),
                                   [&](int64_t c, int f, vf values) { store(to[f] + c, values); });
    }
}

// Magnitude as bits, which order like floats, NaN above all.
static inline vu size_of(vf v) { return (vu)v & 0x7fffffff; }
static inline vu greater(vu a, vu b) { return a > b ? a : b; }

// Quantization step of a tile's values where the largest is 2^14 - 1, and its inverse. Non-finite values make
// the tile's outputs NaN.
struct Unit {
    float value, inverse;
};

static inline Unit unit_of(vu sizes) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = sizes[i] > bits ? sizes[i] : bits;
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    constexpr float kMost = 16383, kLeast = 1e-30f;  // smaller: the inverse would be infinite
    if (!(largest < __builtin_inff())) return {__builtin_nanf(""), 0};
    largest = largest > kLeast ? largest : kLeast;
    return {largest / kMost, kMost / largest};
}

// Rounds to int16, two to a word.
static inline void store_whole(uint32_t* p, vf v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = _mm256_cvtps_epi32((__m256)v);
    const vh whole = (vh)_mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    const vh whole = __builtin_convertvector(whole_bits(v), vh);
#endif
    std::memcpy(p, &whole, sizeof(whole));
}

// As above, as int16 with one step for the whole tile, because values of different channels are summed.
// Levels scale channels by their effect on the result: precision matters where the weights are largest, not
// the values.
template <typename Filter, typename Window>
static void transform_tile_to_whole(const Window& window, const Transformed<Filter>& v, int64_t tile,
                                    const float* levels) {
    constexpr int kFrequencies = Geometry<Filter>::kFrequencies, kVector = kFrequencies * kLanes;
    float* const values = scratch<float>(kSlotTile, v.chunks * divide_up(v.widest, kLanes) * kVector);
    const auto level = [&](int64_t chunk, int64_t c) {
        const Span channels = v.channels(chunk);
        const int64_t left = channels.count() - c;
        return load_up_to(levels + channels.begin + c, static_cast<int>(left < kLanes ? left : kLanes));
    };
    float* to = values;
    vu of_tile{}, of_vector{};
    for (int64_t i = 0; i < v.chunks; ++i) {
        transform_channels<Filter>(window, v.channels(i), [&](int64_t c, int f, vf out) {
            store(to + f * kLanes, out);
            of_vector = greater(of_vector, size_of(out));
            if (f < kFrequencies - 1) return;
            of_tile = greater(of_tile, size_of((vf)of_vector * level(i, c)));
            of_vector = vu{};
            to += kVector;
        });
    }
    const Unit unit = unit_of(of_tile);
    v.units[tile] = unit.value;
    const float* next = values;
    for (int64_t i = 0; i < v.chunks; ++i) {
        uint32_t* words[kFrequencies];
        v.layout.pointers(v.chunk(i), tile, words);
        for (int64_t c = 0; c < v.channels(i).count(); c += kLanes, next += kVector) {
            const vf factor = level(i, c) * splat(unit.inverse);
            for (int f = 0; f < kFrequencies; ++f) {
                store_whole(words[f] + c / 2, load(next + f * kLanes) * factor);
            }
        }
    }
}

template <typename T>
static T zero_of(const Winograd&) {
    return {};
}
template <>
uint8_t zero_of<uint8_t>(const Winograd& a) {
    return static_cast<uint8_t>(a.x_zero);
}

// V of some of its tiles. Pixels beyond the image point to zeros.
template <typename Filter, typename T>
static void transform_input(const Geometry<Filter>& g, const Transformed<Filter>& v, Span tiles) {
    constexpr int kIn = Filter::kIn;
    const Winograd& a = g.a;
    T* zeros = scratch<T>(kSlotZeros, a.c);
    for (int64_t c = 0; c < a.c; ++c) zeros[c] = zero_of<T>(a);
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        const Place p = place_of(g, t);
        const T* image = static_cast<const T*>(a.x) + p.n * a.h * a.w * a.c;
        Pixels<T, kIn * kIn> window;
        window.zero = a.x_zero;
        for (int i = 0; i < kIn * kIn; ++i) {
            const int64_t y = p.in_y + i / kIn, x = p.in_x + i % kIn;
            window.at[i] = y >= 0 && y < a.h && x >= 0 && x < a.w ? image + (y * a.w + x) * a.c : zeros;
        }
        if constexpr (Filter::kWholeNumbers) {
            transform_tile_to_whole(window, v, t - v.tiles.begin, a.levels);
        } else {
            transform_tile(window, v, t - v.tiles.begin);
        }
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
