// For small weights, which are transformed ahead: a task is some blocks whose V and M stay in L2, and the
// weights stream by once per block.
#pragma once

#include "winograd_input.h"
#include "winograd_output.h"
#include "winograd_products.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// The most that V and M of a block take: a quarter of an L2, of 512 KiB or with AVX-512 1 MiB, leaving room
// for the weights that stream by and for prefetched data.
constexpr int64_t kBlockBytes = kMaxPanels == 1 ? 128 * 1024 : 256 * 1024;
// But each weight is multiplied with at least this many tile frequencies: V from L3 costs less than reading
// the weights more often.
constexpr int64_t kLeastRows = 12;
// Up to this many stay in one block. With AVX2, 16 are multiplied 6, 5 and 5 at a time, but in two blocks 4
// at a time, where multipliers wait for loads: 256 channels to 128 at 16 x 16 takes 1.06 of the time.
// Register tiles of AVX-512 are four times as wide and do not wait.
constexpr int64_t kWholeRows = kMaxPanels == 1 ? 18 : kLeastRows;

// How tiles and panels are divided into tasks: bands of consecutive blocks, and parts, which are groups of
// panels.
struct Cut {
    int64_t blocks, bands, parts;
};

// Tiles per block needed to reuse the weights often enough.
template <typename Filter>
static int64_t least_tiles() {
    return divide_up(kLeastRows * Geometry<Filter>::kWeights, Geometry<Filter>::kFrequencies);
}

// Tiles per block that fit in L2.
template <typename Filter>
static int64_t most_tiles(const Geometry<Filter>& g) {
    const int64_t whole = tile_pixels(kMaxPanels);
    return max(least_tiles<Filter>(), kBlockBytes / g.tile_bytes() / whole * whole);
}

// All groups of panels.
template <typename Filter>
static Span all_groups(const Geometry<Filter>& g) {
    return {0, divide_up(g.panels, kGroup)};
}

// Blocks as large as caches and each thread's share allow; if there are few, panels are divided too.
template <typename Filter>
static Cut cut(const Geometry<Filter>& g) {
    const bool whole =
        g.tiles * g.kFrequencies <= kWholeRows * g.kWeights && all_groups(g).end >= g.a.threads;
    int64_t blocks = whole ? 1 : divide_up(g.tiles, most_tiles(g));
    if (g.a.threads == 1) return {blocks, 1, 1};
    const int64_t tasks = 4 * g.a.threads;
    blocks = max(blocks, min(tasks, g.tiles / least_tiles<Filter>()));
    const int64_t bands = min(tasks, blocks);
    return {divide_up(blocks, bands) * bands, bands, min(all_groups(g).end, tasks / bands)};
}

// The outputs of one block for some groups of panels; fetch_next adds data that the next block's transform
// reads.
template <typename Filter, typename T, typename Fetch>
static void convolve_block(const Geometry<Filter>& g, Span tiles, Span groups, const Fetch& fetch_next) {
    using P = typename Filter::P;
    const Winograd& a = g.a;
    Transformed<Filter> v{tiles, a.c, 1};
    v.allocate();
    float* m = scratch<float>(kSlotM, Layout<Filter>{tiles.count(), min(g.panels, kGroup) * kPanel}.words());
    const int64_t words = divide_up(a.c, P::kElements) * kPanel, panel = g.kWeights * words;
    transform_input<Filter, T>(g, v, tiles);
    for (int64_t i = groups.begin; i < groups.end; ++i) {
        const Span panels = share(g.panels, i, all_groups(g).end);
        Ahead ahead;
        fetch_outputs<Filter, T>(g, tiles, panels, ahead);
        if (i + 1 == groups.end) fetch_next(ahead);
        const Weights<P> weights{static_cast<const typename P::Word*>(a.weight) + panels.begin * panel, panel,
                                 words, moved(a.units, panels.begin * g.kWeights * kPanel)};
        const Layout<Filter> m_layout{tiles.count(), panels.count() * kPanel};
        multiply<Filter>(v, 0, weights, m_layout, m, ahead);
        transform_outputs<Filter, T>(g, v, panels, m);
    }
}

// Blocks whose V and M stay in L2, with transformed weights.
template <typename Filter, typename T>
static void run_bands(const Geometry<Filter>& g) {
    const Cut c = cut(g);
    parallel_for(g.a.threads, c.bands * c.parts, [&](int64_t task) {
        const Span blocks = share(c.blocks, task / c.parts, c.bands);
        const Span groups = share(all_groups(g).end, task % c.parts, c.parts);
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            convolve_block<Filter, T>(g, share(g.tiles, block, c.blocks), groups, [&](Ahead& ahead) {
                if (block + 1 == blocks.end) return;
                fetch_inputs<Filter, T>(g, share(g.tiles, block + 1, c.blocks), ahead);
            });
        }
    });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
