// From V to M: one matrix product per weight.
#pragma once

#include "winograd_ahead.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// Products summed from zero before the partial sum joins the total. For 256 channels one running sum has
// twice the error of four sums of 64.
constexpr int64_t kTerms = 64;

// A block's V and M for one weight. Rows are tiles and their frequencies.
template <typename P>
struct Matrices {
    const typename P::Word *v, *weight;
    const float* units;  // for int16: quantization step of the weights, per output channel
    float* m;
    int64_t rows, words, weight_panel, units_panel;
    int64_t v_row, m_row;  // words between rows
    bool add;              // whether to add to M
};

// The products of one chunk of channels, summed from zero. With kFetch each step prefetches one of `lines`.
template <bool kFetch, typename P, int kPixels, int kPanels>
static inline __attribute__((always_inline)) void accumulate_chunk(
    const Matrices<P>& p, const typename P::Word* input, const typename P::Word* weight, int64_t run,
    const void* const* lines, Sums<kPixels, kPanels, typename P::Sum>& out) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const int64_t row = p.v_row, panel = p.weight_panel;
    Sums<kPixels, kPanels, typename P::Sum> sums{};
    for (int64_t k = 0; k < run; ++k, ++input, weight += kPanel) {
        if (kFetch) __builtin_prefetch(lines[k], 0, 2);
        typename P::Weights w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            w[v] = load(weight + v / kPanelVectors * panel + v % kPanelVectors * kLanes);
        }
#pragma GCC unroll 32
        for (int t = 0; t < kPixels; ++t) {
            const typename P::Word x = input[t * row];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums.v[t][v] = P::add(sums.v[t][v], x, w[v]);
        }
    }
    out = sums;
}

template <int kPixels, int kPanels>
static inline const Sums<kPixels, kPanels>& in_floats(const Matrices<Float32>&,
                                                      const Sums<kPixels, kPanels>& sums) {
    return sums;
}

template <int kPixels, int kPanels>
static inline Sums<kPixels, kPanels> in_floats(const Matrices<Int16>& p,
                                               const Sums<kPixels, kPanels, vi>& sums) {
    Sums<kPixels, kPanels> values;
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * kPanelVectors; ++v) {
        const vf unit = load(p.units + v / kPanelVectors * p.units_panel + v % kPanelVectors * kLanes);
#pragma GCC unroll 32
        for (int t = 0; t < kPixels; ++t) values.v[t][v] = as_floats(sums.v[t][v]) * unit;
    }
    return values;
}

// M for `kPixels` rows and kPanels panels of one weight: chunks of channels, each summed from zero.
template <int kPixels, int kPanels, typename P>
static void multiply_rows(const Matrices<P>& p, int64_t first, Ahead& ahead) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const int64_t chunks = divide_up(p.words, kTerms / P::kElements), m_row = p.m_row;
    for (int64_t i = 0; i < chunks; ++i) {
        const Span words = share(p.words, i, chunks);
        Sums<kPixels, kPanels, typename P::Sum> sums;
        const typename P::Word *v = p.v + first * p.v_row + words.begin,
                               *weight = p.weight + words.begin * kPanel;
        // Most steps have nothing to prefetch, and its two loads would take 4 % of their time with AVX2.
        if (const void* const* lines = ahead.take(words.count())) {
            accumulate_chunk<true>(p, v, weight, words.count(), lines, sums);
        } else {
            accumulate_chunk<false>(p, v, weight, words.count(), nullptr, sums);
        }
        const Sums<kPixels, kPanels> values = in_floats(p, sums);
        float* m = p.m + first * m_row;
        const bool add = p.add || i > 0;
#pragma GCC unroll 32
        for (int t = 0; t < kPixels; ++t, m += m_row) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                float* to = m + v * kLanes;
                store(to, add ? load(to) + values.v[t][v] : values.v[t][v]);
            }
        }
    }
}

// Calls multiply_rows<count, kPanels> for a count known at run time.
template <int kPanels, typename P, int kPixels = tile_pixels(kPanels)>
static void multiply_rows_of(int64_t count, const Matrices<P>& p, int64_t first, Ahead& ahead) {
    if constexpr (kPixels > 0) {
        if (count == kPixels) return multiply_rows<kPixels, kPanels>(p, first, ahead);
        multiply_rows_of<kPanels, P, kPixels - 1>(count, p, first, ahead);
    }
}

// M for all rows and `panels` panels, at most kMaxPanels.
template <typename P, int kPanels = kMaxPanels>
static void multiply_panels(int64_t panels, const Matrices<P>& p, Ahead& ahead) {
    if constexpr (kPanels > 0) {
        if (panels != kPanels) return multiply_panels<P, kPanels - 1>(panels, p, ahead);
        const int64_t parts = divide_up(p.rows, tile_pixels(kPanels));
        for (int64_t i = 0; i < parts; ++i) {
            const Span rows = share(p.rows, i, parts);
            multiply_rows_of<kPanels>(rows.count(), p, rows.begin, ahead);
        }
    }
}

// Weights of some panels and channels in the layout of the products.
template <typename P>
struct Weights {
    const typename P::Word* data;
    int64_t panel, weight;  // words between panels, and between weights of a panel
    const float* units;     // for int16: quantization step, panels x weights x 16
};

// M of a block's tiles for some panels and one chunk of V's channels.
template <typename Filter>
static void multiply(const Transformed<Filter>& v, int64_t chunk, const Weights<typename Filter::P>& weights,
                     const Layout<Filter>& m_layout, float* m, Ahead& ahead) {
    using P = typename Filter::P;
    constexpr int64_t kUnits = Geometry<Filter>::kWeights * kPanel;
    const int64_t panels = m_layout.row / kPanel;
    for (int weight = 0; weight < Geometry<Filter>::kWeights; ++weight) {
        for (int64_t i = 0; i < panels; i += kMaxPanels) {
            Matrices<P> p;
            p.v = v.chunk(chunk) + v.layout.start(weight);
            p.weight = weights.data + i * weights.panel + weight * weights.weight;
            p.units = moved(weights.units, i * kUnits + weight * kPanel);
            p.units_panel = kUnits;
            p.m = m + m_layout.start(weight) + i * kPanel;
            p.rows = v.layout.tiles * m_layout.frequencies(weight);
            p.words = divide_up(v.channels(chunk).count(), P::kElements);
            p.weight_panel = weights.panel;
            p.v_row = v.layout.row;
            p.m_row = m_layout.row;
            p.add = chunk > 0;
            multiply_panels<P>(min(kMaxPanels, panels - i), p, ahead);
        }
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
