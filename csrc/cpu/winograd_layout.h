// Positions of Winograd's tiles in the image, and the layout of a block's transformed inputs, V, and
// products, M.
#pragma once

#include "../common/parallel.h"
#include "conv_direct.h"
#include "spans.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

constexpr int kGroup = 4;  // panels whose sums are kept at once

// Scratch slots that a thread uses at the same time.
enum Slot { kSlotV, kSlotM, kSlotAhead, kSlotWeights, kSlotZeros, kSlotUnits, kSlotTile, kSlots };
static_assert(kSlots == kScratchSlots, "no kernel holds more at once, so there are as many slots as here");

template <typename T>
static T* scratch(Slot slot, int64_t count) {
    return static_cast<T*>(thread_scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}

// A filter (winograd_filters.h) whose V is multiplied as words of N: Float32 or Int16.
template <typename F, typename N>
struct Multiplied : F {
    using P = N;
    static constexpr bool kWholeNumbers = N::kElements > 1;
};

template <typename Filter>
struct Geometry {
    using P = typename Filter::P;
    static constexpr int kFrequencies = Filter::kFrequencies * Filter::kFrequencies;
    static constexpr int kWeightRows = Filter::kFrequencies - Filter::kShared + 1;
    static constexpr int kWeights = kWeightRows * kWeightRows;

    const Winograd& a;
    int64_t tiles_h = divide_up(a.out_h, Filter::kOut), tiles_w = divide_up(a.out_w, Filter::kOut);
    int64_t tiles = a.n * tiles_h * tiles_w;
    int64_t panels = divide_up(a.out_c, kPanel);

    // Words of V for `channels` channels of a tile at one frequency, with padding.
    static int64_t words(int64_t channels) { return divide_up(channels, kPanel) * kPanel / P::kElements; }

    // Size of a tile's V and M.
    int64_t tile_bytes() const { return kFrequencies * (words(a.c) + min(panels, kGroup) * kPanel) * 4; }
};

// A block's V or M: [weight][tile][frequency of that weight][channel], so that a weight's products are one
// matrix product.
template <typename Filter>
struct Layout {
    using G = Geometry<Filter>;

    int64_t tiles, row;  // words of a tile at one frequency

    // A gap between weights: at a power of two they would compete for the same cache sets.
    static constexpr int kGap = kPanel;

    int64_t words() const { return G::kFrequencies * tiles * row + G::kWeights * kGap; }

    // In one dimension: the first frequency of a weight, and how many it has.
    static constexpr int first(int weight) { return weight == 0 ? 0 : weight + Filter::kShared - 1; }
    static constexpr int shared(int weight) { return weight == 0 ? Filter::kShared : 1; }

    // Number of frequencies that use a weight, whose index is below kWeights.
    static constexpr int frequencies(int weight) {
        return shared(weight / G::kWeightRows) * shared(weight % G::kWeightRows);
    }

    int64_t start(int weight) const {
        const int y = weight / G::kWeightRows, x = weight % G::kWeightRows;
        return (first(y) * Filter::kFrequencies + shared(y) * first(x)) * tiles * row + weight * kGap;
    }

    // Pointers to a tile's frequencies.
    template <typename Word>
    void pointers(Word* base, int64_t tile, Word* (&at)[G::kFrequencies]) const {
        for (int weight = 0; weight < G::kWeights; ++weight) {
            const int y = weight / G::kWeightRows, x = weight % G::kWeightRows;
            Word* next = base + start(weight) + tile * frequencies(weight) * row;
            for (int i = 0; i < shared(y); ++i) {
                for (int j = 0; j < shared(x); ++j, next += row) {
                    at[(first(y) + i) * Filter::kFrequencies + first(x) + j] = next;
                }
            }
        }
    }
};

// V of some tiles, one chunk of channels after another.
template <typename Filter>
struct Transformed {
    using G = Geometry<Filter>;
    using P = typename Filter::P;

    Span tiles;
    int64_t c, chunks;
    typename P::Word* data = nullptr;
    float* units = nullptr;  // for int16: quantization step of each tile
    // Chunks begin at whole words.
    int64_t channel_words = divide_up(c, P::kElements);
    int64_t widest = divide_up(channel_words, chunks) * P::kElements;  // channels
    Layout<Filter> layout{tiles.count(), G::words(widest)};

    Span words(int64_t chunk) const { return share(channel_words, chunk, chunks); }
    Span channels(int64_t chunk) const {
        return {words(chunk).begin * P::kElements, min(words(chunk).end * P::kElements, c)};
    }
    typename P::Word* chunk(int64_t i) const { return data + i * layout.words(); }

    // Allocates in this thread's scratch memory.
    void allocate() {
        data = scratch<typename P::Word>(kSlotV, chunks * layout.words());
        if (Filter::kWholeNumbers) units = scratch<float>(kSlotUnits, tiles.count());
    }
};

// Position of a tile's first output, and of the first input of its window.
struct Place {
    int64_t n, y, x, in_y, in_x;
};

template <typename Filter>
static Place place_of(const Geometry<Filter>& g, int64_t tile) {
    const int64_t row = tile / g.tiles_w, y = row % g.tiles_h, x = tile % g.tiles_w;
    return {row / g.tiles_h, y * Filter::kOut, x * Filter::kOut, y * Filter::kStep - Filter::kPadding,
            x * Filter::kStep - Filter::kPadding};
}

// Calls row(place, count) for runs of adjacent tiles in a row of the image.
template <typename Filter, typename Row>
static void each_row(const Geometry<Filter>& g, Span tiles, const Row& row) {
    for (int64_t t = tiles.begin; t < tiles.end;) {
        const int64_t count = min(tiles.end - t, g.tiles_w - t % g.tiles_w);
        row(place_of(g, t), count);
        t += count;
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
