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
    return {static_cast<const float*>(a.weight) + ((panel * a.c + first) * kTaps + c - first) * kPanel,
            min(a.chunk, a.c - first) * kPanel};
}

// G w Gt of one panel and channel, to u, u + weight, ...
template <typename Filter>
static void transform_weight(const Taps& taps, float* u, int64_t weight) {
    constexpr int kRows = Geometry<Filter>::kWeightRows;
    for (int v = 0; v < kPanelVectors; ++v, u += kLanes) {
        transform_square<3, kRows, Filter::weights>(
            [&](int row, int column) { return load(taps.data + (row * 3 + column) * taps.tap + v * kLanes); },
            [&](int row, int column, vf value) {
                const double scale = Filter::kScales[row] * Filter::kScales[column];
                store(u + (row * kRows + column) * weight, splat(static_cast<float>(scale)) * value);
            });
    }
}

// The weights of one panel, channel after channel.
class Channels {
   public:
    Channels(const Winograd& a, int64_t panel, int64_t c) : a_(a), panel_(panel), c_(c) {}

    Taps next() {
        if (left_ == 0) {
            taps_ = taps_of(a_, panel_, c_);
            left_ = a_.chunk - c_ % a_.chunk;
        }
        const Taps taps = taps_;
        taps_.data += kPanel;
        ++c_, --left_;
        return taps;
    }

   private:
    const Winograd& a_;
    int64_t panel_, c_, left_ = 0;
    Taps taps_{};
};

// The weights of some channels of one panel as products read them, to u, u + weight, ...
template <typename Filter>
static void transform_weights(Channels from, int64_t count, const float*, const float*, float* u,
                              int64_t weight) {
    for (int64_t c = 0; c < count; ++c, u += kPanel) transform_weight<Filter>(from.next(), u, weight);
}

// Channels of level 0 have no weights.
static inline float inverse_of(float level) { return level > 0 ? 1 / level : 0; }

// In whole numbers of these units, two channels to a word; divided by the channels' levels.
template <typename Filter>
static void transform_weights(Channels from, int64_t count, const float* levels, const float* units,
                              uint32_t* u, int64_t weight) {
    constexpr int kFloats = Geometry<Filter>::kWeights * kPanel;
    float inverses[kFloats], first[kFloats], second[kFloats] = {};
    for (int i = 0; i < kFloats; ++i) inverses[i] = 1 / units[i];
    for (int64_t c = 0; c < count; c += 2, u += kPanel) {
        transform_weight<Filter>(from.next(), first, kPanel);
        if (c + 1 < count) {
            transform_weight<Filter>(from.next(), second, kPanel);
        } else {
            std::memset(second, 0, sizeof(second));
        }
        const vf of_first = splat(inverse_of(levels[c])),
                 of_second = splat(c + 1 < count ? inverse_of(levels[c + 1]) : 0);
        for (int i = 0; i < kFloats; i += kLanes) {
            const vf inverse = load(inverses + i);
            const vu low = whole_bits(load(first + i) * of_first * inverse),
                     high = whole_bits(load(second + i) * of_second * inverse);
            const vu words = (low & 0xffff) | high << 16;
            std::memcpy(u + i / kPanel * weight + i % kPanel, &words, sizeof(words));
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

// The outputs of a wave's tiles for some panels from their V.
template <typename Filter, typename T>
static void convolve_wave(const Geometry<Filter>& g, const Transformed<Filter>& v, Span panels) {
    using P = typename Filter::P;
    using Word = typename P::Word;
    const Winograd& a = g.a;
    const Layout<Filter> m_layout{v.tiles.count(), panels.count() * kPanel};
    float* m = scratch<float>(kSlotM, m_layout.words());
    const int64_t weight = panels.count() * divide_up(v.widest, P::kElements) * kPanel + kPanel;
    Word* u = scratch<Word>(kSlotWeights, g.kWeights * weight);
    const auto units = [&](int64_t panel) { return moved(a.units, panel * g.kWeights * kPanel); };
    for (int64_t i = 0; i < v.chunks; ++i) {
        Word* to = u;
        const Span channels = v.channels(i);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
            transform_weights<Filter>({a, panel, channels.begin}, channels.count(),
                                      moved(a.levels, channels.begin), units(panel), to, weight);
            to += divide_up(channels.count(), P::kElements) * kPanel;
        }
        Ahead ahead;
        if (i + 1 < v.chunks) {
            each_run(a, panels, v.channels(i + 1), [&](const Taps& taps, int64_t count) {
                for (int tap = 0; tap < kTaps; ++tap)
                    ahead.add(taps.data + tap * taps.tap, count * kPanel * 4);
            });
        } else {
            fetch_outputs<Filter, T>(g, v.tiles, panels, ahead);
        }
        const Weights<P> weights{u, divide_up(channels.count(), P::kElements) * kPanel, weight,
                                 units(panels.begin)};
        multiply<Filter>(v, i, weights, m_layout, m, ahead);
    }
    transform_outputs<Filter, T>(g, v, panels, m);
}

// Waves of tiles, with weights that are not transformed yet.
template <typename Filter, typename T>
static void run_waves(const Geometry<Filter>& g) {
    const Winograd& a = g.a;
    const int64_t most = max(kWaveTiles, kWaveBytes / (g.kFrequencies * g.words(a.c) * 4));
    const int64_t waves = divide_up(g.tiles, most);
    for (int64_t i = 0; i < waves; ++i) {
        Transformed<Filter> v{share(g.tiles, i, waves), a.c, divide_up(a.c, kTerms)};
        v.allocate();
        const int64_t tiles = v.tiles.count(), parts = min(tiles, 4 * a.threads);
        parallel_for(a.threads, parts, [&](int64_t part) {
            const Span some = share(tiles, part, parts);
            transform_input<Filter, T>(g, v, {v.tiles.begin + some.begin, v.tiles.begin + some.end});
        });
        const int64_t groups = divide_up(g.panels, tiles < kFewTiles ? kGroup / 2 : kGroup);
        parallel_for(a.threads, groups,
                     [&](int64_t group) { convolve_wave<Filter, T>(g, v, share(g.panels, group, groups)); });
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
