// The output transform: from M to outputs.
#pragma once

#include "winograd_filters.h"
#include "winograd_layout.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The outputs of one tile, for one vector of channels from channel `at` of M: put(row, column, y).
template <typename Filter, typename Put>
static inline __attribute__((always_inline)) void transform_output(const float* const* from, int64_t at,
                                                                   const Put& put) {
    constexpr int kFrequencies = Filter::kFrequencies;
    transform_square<kFrequencies, Filter::kOut, Filter::output>(
        [&](int row, int column) { return load(from[row * kFrequencies + column] + at); }, put);
}

// The outputs of a tile entirely within the image, for a whole panel from channel `at` of M, in registers.
template <typename Filter, typename T>
static void finish_whole(const float* const* from, int64_t at, float unit, const Epilogue<T>& e) {
    for (int first = 0; first < kPanel; first += kLanes) {
        const vf scale = (e.scale ? load(e.scale + first) : splat(1)) * splat(unit);
        const vf shift = e.shift ? load(e.shift + first) : vf{};
        transform_output<Filter>(from, at + first, [&](int row, int column, vf y) {
            finish_channels(y * scale + shift, row * e.row + column * e.pixel + first, kLanes, e);
        });
    }
}

// The outputs of any tile.
template <typename Filter, typename T>
static void finish_part(const float* const* from, int64_t at, float unit, int64_t height, int64_t width,
                        const Epilogue<T>& e) {
    constexpr int kOut = Filter::kOut;
    Sums<kOut, 1> rows[kOut];
    for (int v = 0; v < kPanelVectors; ++v) {
        transform_output<Filter>(from, at + v * kLanes, [&](int row, int column, vf y) {
            rows[row].v[column][v] = Filter::kWholeNumbers ? y * splat(unit) : y;
        });
    }
    for (int64_t y = 0; y < height; ++y) {
        finish_sums(reinterpret_cast<const float*>(rows[y].v), static_cast<int>(width), kPanelVectors,
                    e.at(y * e.row));
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
        const Epilogue<T> e = of_tile.of_channels(oc, min(kPanel, a.out_c - oc));
        if (height == kOut && width == kOut && e.channels == kPanel) {
            finish_whole<Filter>(from, i * kPanel, unit, e);
        } else {
            finish_part<Filter>(from, i * kPanel, unit, height, width, e);
        }
    }
}

// The outputs of V's tiles for some panels, from their M.
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
