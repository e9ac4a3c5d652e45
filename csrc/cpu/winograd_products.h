// From V to M: a matrix product for every weight.
#pragma once

#include "winograd_ahead.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// Products that are summed from zero before they join the rest. Of 256 channels a running sum makes twice
// the error of four sums of 64.
constexpr int64_t kTerms = 64;

// A block's V and M of one weight. Rows are tiles and their frequencies.
struct Matrices {
    const float *v, *weight;
    float* m;
    int64_t rows, c, weight_panel;
    int64_t v_row, m_row;  // floats between rows
    bool add;              // to what M holds
};

// The products of one chunk of channels, summed from zero. A step fetches one of `lines`, if kFetch.
template <bool kFetch, int kPixels, int kPanels>
static inline __attribute__((always_inline)) void accumulate_chunk(const Matrices& p, const float* input,
                                                                   const float* weight, int64_t run,
                                                                   const void* const* lines,
                                                                   Sums<kPixels, kPanels>& out) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const int64_t row = p.v_row, panel = p.weight_panel;
    Sums<kPixels, kPanels> sums{};
    for (int64_t k = 0; k < run; ++k, ++input, weight += kPanel) {
        if (kFetch) __builtin_prefetch(lines[k], 0, 2);
        vf w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            w[v] = load(weight + v / kPanelVectors * panel + v % kPanelVectors * kLanes);
        }
#pragma GCC unroll 32
        for (int t = 0; t < kPixels; ++t) {
            const vf x = splat(input[t * row]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums.v[t][v] += x * w[v];
        }
    }
    out = sums;
}

// M of `kPixels` rows and kPanels panels of one weight: chunks of channels, each summed from zero.
template <int kPixels, int kPanels>
static void multiply_rows(const Matrices& p, int64_t first, Ahead& ahead) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const int64_t chunks = divide_up(p.c, kTerms), m_row = p.m_row;
    for (int64_t i = 0; i < chunks; ++i) {
        const Span c = share(p.c, i, chunks);
        Sums<kPixels, kPanels> sums;
        const float *v = p.v + first * p.v_row + c.begin, *weight = p.weight + c.begin * kPanel;
        // Most steps have nothing to fetch, and its two loads would take 4 % of their time with AVX2.
        if (const void* const* lines = ahead.take(c.count())) {
            accumulate_chunk<true>(p, v, weight, c.count(), lines, sums);
        } else {
            accumulate_chunk<false>(p, v, weight, c.count(), nullptr, sums);
        }
        float* m = p.m + first * m_row;
        const bool add = p.add || i > 0;
#pragma GCC unroll 32
        for (int t = 0; t < kPixels; ++t, m += m_row) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                float* to = m + v * kLanes;
                store(to, add ? load(to) + sums.v[t][v] : sums.v[t][v]);
            }
        }
    }
}

// Calls multiply_rows<count, kPanels> for a count known at run time.
template <int kPanels, int kPixels = tile_pixels(kPanels)>
static void multiply_rows_of(int64_t count, const Matrices& p, int64_t first, Ahead& ahead) {
    if constexpr (kPixels > 0) {
        if (count == kPixels) return multiply_rows<kPixels, kPanels>(p, first, ahead);
        multiply_rows_of<kPanels, kPixels - 1>(count, p, first, ahead);
    }
}

// M of all rows for `panels` panels, at most kMaxPanels.
template <int kPanels = kMaxPanels>
static void multiply_panels(int64_t panels, const Matrices& p, Ahead& ahead) {
    if constexpr (kPanels > 0) {
        if (panels != kPanels) return multiply_panels<kPanels - 1>(panels, p, ahead);
        const int64_t parts = divide_up(p.rows, tile_pixels(kPanels));
        for (int64_t i = 0; i < parts; ++i) {
            const Span rows = share(p.rows, i, parts);
            multiply_rows_of<kPanels>(rows.count(), p, rows.begin, ahead);
        }
    }
}

// Weights of some panels and channels as products read them.
struct Weights {
    const float* data;
    int64_t panel, weight;  // floats between panels, and between weights of a panel
};

// M of a block's tiles for `panels` panels and `c` channels of V.
template <typename Filter>
static void multiply(const Layout<Filter>& v_layout, const float* v, const Weights& weights, int64_t c,
                     bool add, const Layout<Filter>& m_layout, float* m, Ahead& ahead) {
    const int64_t panels = m_layout.row / kPanel;
    for (int weight = 0; weight < Geometry<Filter>::kWeights; ++weight) {
        for (int64_t i = 0; i < panels; i += kMaxPanels) {
            Matrices p;
            p.v = v + v_layout.start(weight);
            p.weight = weights.data + i * weights.panel + weight * weights.weight;
            p.m = m + m_layout.start(weight) + i * kPanel;
            p.rows = v_layout.tiles * m_layout.frequencies(weight);
            p.c = c;
            p.weight_panel = weights.panel;
            p.v_row = v_layout.row;
            p.m_row = m_layout.row;
            p.add = add;
            multiply_panels(min(kMaxPanels, panels - i), p, ahead);
        }
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
