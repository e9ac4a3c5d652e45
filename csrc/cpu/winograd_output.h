// From M to outputs.
#pragma once

#include "winograd_filters.h"
#include "winograd_layout.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The rows of one tile's outputs, for the panel from channel `at` of M, in which 1 is worth `unit`.
template <typename Filter>
static void transform_output(const float* const* from, int64_t at, float unit,
                             Sums<Filter::kOut, 1> (&rows)[Filter::kOut]) {
    constexpr int kOut = Filter::kOut, kFrequencies = Filter::kFrequencies;
    for (int v = 0; v < kPanelVectors; ++v, at += kLanes) {
        transform_square<kFrequencies, kOut, Filter::output>(
            [&](int row, int column) { return load(from[row * kFrequencies + column] + at); },
            [&](int row, int column, vf y) {
                rows[row].v[column][v] = Filter::kWholeNumbers ? y * splat(unit) : y;
            });
    }
}

// finish() for a count of pixels known at run time.
template <int kOut, typename E, int kPixels = kOut>
static void finish_row(int64_t pixels, const Sums<kOut, 1>& row, const E& e) {
    if constexpr (kPixels > 0) {
        if (pixels < kPixels) return finish_row<kOut, E, kPixels - 1>(pixels, row, e);
        Sums<kPixels, 1> some;
        for (int p = 0; p < kPixels; ++p) {
            for (int v = 0; v < kPanelVectors; ++v) some.v[p][v] = row.v[p][v];
        }
        finish(some, e);
    }
}

// The outputs of one tile for `panels` panels from output channel `oc`.
template <typename Filter, typename T>
static void finish_tile(const Winograd& a, const Place& place, int64_t oc, int64_t panels,
                        const float* const* from, float unit) {
    constexpr int kOut = Filter::kOut;
    const int64_t height = min(kOut, a.out_h - place.y), width = min(kOut, a.out_w - place.x);
    const Epilogue<T> of_tile =
        epilogue_of<T>(a).at(place.n * a.stride_n + place.y * a.stride_h + place.x * a.stride_w);
    for (int64_t i = 0; i < panels; ++i, oc += kPanel) {
        Sums<kOut, 1> rows[kOut];
        transform_output<Filter>(from, i * kPanel, unit, rows);
        const Epilogue<T> e = of_tile.of_channels(oc, min(kPanel, a.out_c - oc));
        for (int64_t y = 0; y < height; ++y) finish_row<kOut>(width, rows[y], e.at(y * a.stride_h));
    }
}

// The outputs of V's tiles for some panels from their M.
template <typename Filter, typename T>
static void transform_outputs(const Geometry<Filter>& g, const Transformed<Filter>& v, Span panels,
                              float* m) {
    const Layout<Filter> layout{v.tiles.count(), panels.count() * kPanel};
    for (int64_t i = 0; i < v.tiles.count(); ++i) {
        float* from[g.kFrequencies];
        layout.pointers(m, i, from);
        const float unit = Filter::kWholeNumbers ? v.units[i] : 1;
        finish_tile<Filter, T>(g.a, place_of(g, v.tiles.begin + i), panels.begin * kPanel, panels.count(),
                               from, unit);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
