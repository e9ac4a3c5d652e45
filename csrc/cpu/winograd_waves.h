// For large weights, which would come from memory and are therefore not transformed ahead: a task is some
// panels. It transforms their channels chunk by chunk into L2, for all tiles of a wave, whose V the threads
// have computed before.
#pragma once

#include "winograd_input.h"
#include "winograd_output.h"
#include "winograd_products.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

constexpr int kTaps = 9;

// Tiles of a wave: limited by the size of their V in L3, but enough that transforming the weights, which
// takes the time of 6 tiles' products, is a tenth of the whole.
constexpr int64_t kWaveBytes = 4 * 1024 * 1024;
constexpr int64_t kWaveTiles = 64;
// With fewer tiles, weight chunks for half a group leave more of L2 to V and M: 3 to 10 % faster for 16
// tiles, 5 % slower for 64.
constexpr int64_t kFewTiles = 32;

// A panel's 3x3 weights in words, as packed by ops/conv_bn_act.py: one channel's float32, or for int16
// products two channels' bfloat16.
struct Taps {
    const uint32_t* data;
    int64_t tap;  // words between taps
};

template <typename P>
static Taps taps_of(const Winograd& a, int64_t panel, int64_t word) {
    const int64_t words = divide_up(a.c, P::kElements), first = word / a.chunk * a.chunk;
    return {
        static_cast<const uint32_t*>(a.weight) + ((panel * words + first) * kTaps + word - first) * kPanel,
        min(a.chunk, words - first) * kPanel};
}

// G w Gt of one vector of output channels, without the scales: taps are get(words), and put(weight, vector)
// receives the results.
template <typename Filter, typename Get, typename Put>
static inline __attribute__((always_inline)) void transform_taps(const uint32_t* words, int64_t tap,
                                                                 const Get& get, const Put& put) {
    constexpr int kRows = Geometry<Filter>::kWeightRows;
    transform_square<3, kRows, Filter::weights>(
        [&](int row, int column) { return get(load(words + (row * 3 + column) * tap)); },
        [&](int row, int column, vf value) { put(row * kRows + column, value); });
}

template <typename Filter>
static constexpr float scale_of(int weight) {
    constexpr int kRows = Geometry<Filter>::kWeightRows;
    return static_cast<float>(Filter::kScales[weight / kRows] * Filter::kScales[weight % kRows]);
}

// The weights of one panel, word after word.
template <typename P>
class Words {
   public:
    Words(const Winograd& a, int64_t panel, int64_t word) : a_(a), panel_(panel), word_(word) {}

    Taps next() {
        if (left_ == 0) {
            taps_ = taps_of<P>(a_, panel_, word_);
            left_ = a_.chunk - word_ % a_.chunk;
        }
        const Taps taps = taps_;
        taps_.data += kPanel;
        ++word_, --left_;
        return taps;
    }

   private:
    const Winograd& a_;
    int64_t panel_, word_, left_ = 0;
    Taps taps_{};
};

// A panel's weights for some channels in the layout of the products, to u, u + weight, ...
template <typename Filter>
static void transform_weights(Words<Float32> from, int64_t channels, const float*, const float*, float* u,
                              int64_t weight) {
    for (int64_t c = 0; c < channels; ++c) {
        const Taps taps = from.next();
        for (int v = 0; v < kPanelVectors; ++v, u += kLanes) {
            transform_taps<Filter>(
                taps.data + v * kLanes, taps.tap, [](vu word) { return (vf)word; },
                [&](int i, vf value) { store(u + i * weight, splat(scale_of<Filter>(i)) * value); });
        }
    }
}

// Channels of level 0 have no weights.
static inline float inverse_of(float level) { return level > 0 ? 1 / level : 0; }

// As int16, two channels to a word: divided by the channels' levels, times the inverses of the units.
template <typename Filter>
static void transform_weights(Words<Int16> from, int64_t channels, const float* levels, const float* inverses,
                              uint32_t* u, int64_t weight) {
    constexpr int kWeights = Geometry<Filter>::kWeights;
    for (int64_t c = 0; c < channels; c += 2) {
        const Taps taps = from.next();
        const vf of_first = splat(inverse_of(levels[c])),
                 of_second = splat(c + 1 < channels ? inverse_of(levels[c + 1]) : 0);
        for (int v = 0; v < kPanelVectors; ++v, u += kLanes) {
            vu first[kWeights];
            const auto whole = [&](int i, vf value) {
                return whole_bits(value * load(inverses + i * kPanel + v * kLanes));
            };
            transform_taps<Filter>(
                taps.data + v * kLanes, taps.tap, [&](vu word) { return (vf)(word << 16) * of_first; },
                [&](int i, vf value) { first[i] = whole(i, value) & 0xffff; });
            transform_taps<Filter>(
                taps.data + v * kLanes, taps.tap,
                [&](vu word) { return (vf)(word & 0xffff0000) * of_second; },
                [&](int i, vf value) {
                    const vu words = first[i] | whole(i, value) << 16;
                    std::memcpy(u + i * weight, &words, sizeof(words));
                });
        }
    }
}

// Calls run(taps of the first, count) for runs of adjacent words, panel after panel.
template <typename P, typename Run>
static void each_run(const Winograd& a, Span panels, Span words, const Run& run) {
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for (int64_t word = words.begin; word < words.end;) {
            const int64_t end = min(words.end, (word / a.chunk + 1) * a.chunk);
            run(taps_of<P>(a, panel, word), end - word);
            word = end;
        }
    }
}

// Factors that convert some panels' transformed weights to int16; null for float32.
template <typename Filter>
static const float* inverse_units(const Winograd& a, Span panels, float* inverses) {
    if (!Filter::kWholeNumbers) return nullptr;
    constexpr int kWeights = Geometry<Filter>::kWeights;
    const float* units = a.units + panels.begin * kWeights * kPanel;
    float* to = inverses;
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
        for (int i = 0; i < kWeights * kPanelVectors; ++i, units += kLanes, to += kLanes) {
            store(to, splat(scale_of<Filter>(i / kPanelVectors)) / load(units));
        }
    }
    return inverses;
}

// The outputs of a wave's tiles for some panels, from their V.
template <typename Filter, typename T>
static void convolve_wave(const Geometry<Filter>& g, const Transformed<Filter>& v, Span panels) {
    using P = typename Filter::P;
    using Word = typename P::Word;
    const Winograd& a = g.a;
    const Layout<Filter> m_layout{v.tiles.count(), panels.count() * kPanel};
    float* m = scratch<float>(kSlotM, m_layout.words());
    const int64_t weight = panels.count() * divide_up(v.widest, P::kElements) * kPanel + kPanel;
    Word* u = scratch<Word>(kSlotWeights, g.kWeights * weight);
    constexpr int64_t kUnits = g.kWeights * kPanel;
    float memory[kGroup * kUnits];
    const float* const inverses = inverse_units<Filter>(a, panels, memory);
    for (int64_t i = 0; i < v.chunks; ++i) {
        Word* to = u;
        const Span channels = v.channels(i), words = v.words(i);
        for (int64_t panel = panels.begin; panel < panels.end; ++panel, to += words.count() * kPanel) {
            transform_weights<Filter>(Words<P>{a, panel, words.begin}, channels.count(),
                                      moved(a.levels, channels.begin),
                                      moved(inverses, (panel - panels.begin) * kUnits), to, weight);
        }
        Ahead ahead;
        if (i + 1 < v.chunks) {
            each_run<P>(a, panels, v.words(i + 1), [&](const Taps& taps, int64_t count) {
                for (int tap = 0; tap < kTaps; ++tap)
                    ahead.add(taps.data + tap * taps.tap, count * kPanel * 4);
            });
        } else {
            fetch_outputs<Filter, T>(g, v.tiles, panels, ahead);
        }
        const Weights<P> weights{u, words.count() * kPanel, weight, moved(a.units, panels.begin * kUnits)};
        multiply<Filter>(v, i, weights, m_layout, m, ahead);
    }
    transform_outputs<Filter, T>(g, v, panels, m);
}

// Waves of tiles, with untransformed weights.
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
