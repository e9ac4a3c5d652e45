// Both convolutions of a shared block in turn, block by block of tiles, down a band of the image: the second
// reads the latest output of the first.
#pragma once

#include "winograd_bands.h"
#include "winograd_filters.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

// Consecutive blocks of tiles of nearly equal size.
class Blocks {
   public:
    Blocks(Span tiles, int64_t most) : tiles_(tiles), count_(divide_up(tiles.count(), most)) {}

    bool done() const { return next_ == count_; }
    Span block() const {
        const Span part = share(tiles_.count(), next_, count_);
        return {tiles_.begin + part.begin, tiles_.begin + part.end};
    }
    Span take() {
        const Span taken = block();
        ++next_;
        return taken;
    }

   private:
    Span tiles_;
    int64_t count_, next_ = 0;
};

// A band's blocks of hidden tiles and outputs in turn, each hidden block as late as its readers allow.
class Turns {
   public:
    struct Turn {
        bool hidden;
        Span tiles;  // empty after the last
    };

    Turns(Blocks hidden, Blocks outputs, int64_t row) : hidden_(hidden), outputs_(outputs), row_(row) {}

    Turn next() {
        if (outputs_.done()) return {};
        const int64_t needed = ((outputs_.block().end - 1) / row_ + 2) * row_;
        const bool hidden = !hidden_.done() && hidden_.block().begin < needed;
        return {hidden, hidden ? hidden_.take() : outputs_.take()};
    }

   private:
    Blocks hidden_, outputs_;
    int64_t row_;  // tiles
};

// One convolution of a shared block, from and to dense memory.
static Winograd convolution(const WinogradBlock& b, const void* x, const float* scale, const float* shift,
                            void* out, float slope) {
    Winograd a{};
    a.x = x;
    a.weight = b.weight;
    a.units = b.units;
    a.levels = b.levels;
    a.scale = scale;
    a.shift = shift;
    a.out = out;
    a.dtype = b.dtype;
    a.product = b.product;
    a.n = b.n;
    a.h = a.out_h = b.h;
    a.w = a.out_w = b.w;
    a.c = a.out_c = a.stride_w = b.c;
    a.stride_h = b.w * b.c;
    a.stride_n = b.h * a.stride_h;
    a.slope = slope;
    return a;
}

// One thread's share of the hidden tiles in the two rows at each edge between bands.
template <typename Filter, typename T>
static void make_edges(const Geometry<Filter>& g, int64_t rows, int64_t bands, Span mine) {
    const int64_t edge = 2 * g.tiles_w, most = most_tiles(g);
    for (int64_t at = mine.begin; at < mine.end;) {
        const int64_t i = at / edge, end = min((i + 1) * edge, mine.end);
        const int64_t start = (share(rows, i + 1, bands).begin - 1) * g.tiles_w - i * edge;
        for (Blocks blocks({at + start, end + start}, most); !blocks.done();) {
            convolve_block<Filter, T>(g, blocks.take(), all_groups(g), [](Ahead&) {});
        }
        at = end;
    }
}

// Both convolutions for a band of tile rows; `made`: the hidden rows to compute.
template <typename Filter, typename T>
static void run_band(const Geometry<Filter>& first, const Geometry<Filter>& second, Span made, Span band) {
    const int64_t row = first.tiles_w, most = most_tiles(first);
    Turns turns(Blocks({made.begin * row, made.end * row}, most),
                Blocks({band.begin * row, band.end * row}, most), row);
    for (Turns::Turn turn = turns.next(), after; turn.tiles.count() > 0; turn = after) {
        after = turns.next();
        const Geometry<Filter>& g = turn.hidden ? first : second;
        convolve_block<Filter, T>(g, turn.tiles, all_groups(g), [&](Ahead& ahead) {
            fetch_inputs<Filter, T>(after.hidden ? first : second, after.tiles, ahead);
        });
    }
}

// Bands of tile rows, one per thread. The two hidden rows at an edge between bands are read by both; all
// threads together compute them first.
template <typename Filter, typename T>
static void run_block(const WinogradBlock& b) {
    const Winograd to_hidden = convolution(b, b.x, b.scale1, b.shift1, b.hidden, b.slope);
    Winograd to_out = convolution(b, b.hidden, b.scale2, b.shift2, b.out, 0);
    to_out.residual = b.x;
    to_out.skip = b.skip ? b.x : nullptr;
    const Geometry<Filter> first{to_hidden}, second{to_out};
    const int64_t rows = b.n * first.tiles_h, bands = max(1, min(b.threads, rows / 2));
    const int64_t at_edges = (bands - 1) * 2 * first.tiles_w;
    parallel_for(b.threads, min(b.threads, at_edges), [&](int64_t i) {
        make_edges<Filter, T>(first, rows, bands, share(at_edges, i, min(b.threads, at_edges)));
    });
    parallel_for(b.threads, bands, [&](int64_t i) {
        const Span band = share(rows, i, bands);
        run_band<Filter, T>(first, second, {band.begin + (i > 0), band.end - (i + 1 < bands)}, band);
    });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
