// Many weights would come from memory, so they come as they are, and a task is some panels: it transforms
// chunk after chunk of their channels into L2, for all tiles of a wave, whose V the threads have made before.
#pragma once

#include "winograd_input.h"
#include "winograd_output.h"
#include "winograd_products.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

constexpr int kTaps = 9;

// Tiles of a wave: what V of them takes in L3 at most, but so many that transforming the weights, which takes
// the time of 6 tiles' products, is a tenth of the whole.
constexpr int64_t kWaveBytes = 4 * 1024 * 1024;
constexpr int64_t kWaveTiles = 64;
// With fewer tiles a chunk of weights of half a group leaves more of L2 to V and M: 3 to 10 % faster for 16
// tiles, 5 % slower for 64.
constexpr int64_t kFewTiles = 32;

// The 3x3 weights of a panel and channel, as ops/conv_bn_act.py packs them.
struct Taps {
    const float* data;
    int64_t tap;  // floats between taps
};

static Taps taps_of(const Winograd& a, int64_t panel, int64_t c) {
    const int64_t first = c / a.chunk * a.chunk;
    return {a.weight + ((panel * a.c + first) * kTaps + c - first) * kPanel,
            min(a.chunk, a.c - first) * kPanel};
}

// G w Gt of one panel and channel, to u, u + weight, ...
template <typename Filter>
static void transform_weight(const Taps& taps, float* u, int64_t weight) {
    constexpr int kRows = Geometry<Filter>::kWeightRows;
    for (int v = 0; v < kPanelVectors; ++v, u += kLanes) {
        vf half[kRows][3];
#pragma GCC unroll 3
        for (int column = 0; column < 3; ++column) {
            vf in[3], out[kRows];
#pragma GCC unroll 3
            for (int row = 0; row < 3; ++row) {
                in[row] = load(taps.data + (row * 3 + column) * taps.tap + v * kLanes);
            }
            Filter::weights(in, out);
#pragma GCC unroll 9
            for (int row = 0; row < kRows; ++row) half[row][column] = out[row];
        }
#pragma GCC unroll 9
        for (int row = 0; row < kRows; ++row) {
            vf out[kRows];
            Filter::weights(half[row], out);
#pragma GCC unroll 9
            for (int column = 0; column < kRows; ++column) {
                const double scale = Filter::kScales[row] * Filter::kScales[column];
                store(u + (row * kRows + column) * weight, splat(static_cast<float>(scale)) * out[column]);
            }
        }
    }
}

// Calls run(taps of the first, count) for channels that lie together, panel after panel.
template <typename Run>
static void each_run(const Winograd& a, Span panels, Span channels, const Run& run) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for (int64_t c = channels.begin; c < channels.end;) {
            const int64_t end = min(channels.end, (c / a.chunk + 1) * a.chunk);
            run(taps_of(a, panel, c), end - c);
            c = end;
        }
    }
}

// A wave's V is that of one chunk of channels after another.
template <typename Filter>
struct Wave {
    const Geometry<Filter>& g;
    Span tiles;
    int64_t chunks = divide_up(g.a.c, kTerms), widest = divide_up(g.a.c, chunks);
    Layout<Filter> layout{tiles.count(), divide_up(widest, kPanel) * kPanel};

    Span channels(int64_t chunk) const { return share(g.a.c, chunk, chunks); }
};

// The outputs of a wave's tiles for some panels from their V.
template <typename Filter, typename T>
static void convolve_wave(const Wave<Filter>& wave, Span panels, const float* v) {
    const Winograd& a = wave.g.a;
    const Layout<Filter> m_layout{wave.tiles.count(), panels.count() * kPanel};
    float* m = scratch<float>(kSlotM, m_layout.floats());
    const int64_t weight = panels.count() * wave.widest * kPanel + kPanel;
    float* u = scratch<float>(kSlotWeights, wave.g.kWeights * weight);
    for (int64_t i = 0; i < wave.chunks; ++i) {
        const Span channels = wave.channels(i);
        float* to = u;
        each_run(a, panels, channels, [&](Taps taps, int64_t count) {
            for (int64_t c = 0; c < count; ++c, taps.data += kPanel, to += kPanel) {
                transform_weight<Filter>(taps, to, weight);
            }
        });
        Ahead ahead;
        if (i + 1 < wave.chunks) {
            each_run(a, panels, wave.channels(i + 1), [&](const Taps& taps, int64_t count) {
                for (int tap = 0; tap < kTaps; ++tap)
                    ahead.add(taps.data + tap * taps.tap, count * kPanel * 4);
            });
        } else {
            fetch_outputs<Filter, T>(wave.g, wave.tiles, panels, ahead);
        }
        const Weights weights{u, channels.count() * kPanel, weight};
        multiply<Filter>(wave.layout, v + i * wave.layout.floats(), weights, channels.count(), i > 0,
                         m_layout, m, ahead);
    }
    transform_outputs<Filter, T>(wave.g, wave.tiles, panels, m);
}

// Waves of tiles, with weights that are not transformed yet.
template <typename Filter, typename T>
static void run_waves(const Geometry<Filter>& g) {
    const Winograd& a = g.a;
    const int64_t most = max(kWaveTiles, kWaveBytes / (g.kFrequencies * g.channels * 4));
    const int64_t waves = divide_up(g.tiles, most);
    for (int64_t i = 0; i < waves; ++i) {
        const Wave<Filter> wave{g, share(g.tiles, i, waves)};
        const int64_t tiles = wave.tiles.count(), parts = min(tiles, 4 * a.threads);
        float* v = scratch<float>(kSlotV, wave.chunks * wave.layout.floats());
        parallel_for(a.threads, parts, [&](int64_t part) {
            const Span some = share(tiles, part, parts);
            for (int64_t chunk = 0; chunk < wave.chunks; ++chunk) {
                transform_input<Filter, T>(g, {wave.tiles.begin + some.begin, wave.tiles.begin + some.end},
                                           wave.channels(chunk), wave.layout, wave.tiles.begin,
                                           v + chunk * wave.layout.floats());
            }
        });
        const int64_t groups = divide_up(g.panels, tiles < kFewTiles ? kGroup / 2 : kGroup);
        parallel_for(a.threads, groups, [&](int64_t group) {
            convolve_wave<Filter, T>(wave, share(g.panels, group, groups), v);
        });
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
