// 3x3 convolutions of padding 1, and transposed ones of stride 2, with fewer multiplications.
//
// The input of a block of tiles is transformed once, into V, and for each group of weight panels multiplied,
// frequency after frequency, into M, which the output transform and the epilogue turn into outputs.
//
// Few weights come transformed: a task is some blocks whose V and M stay in L2, and weights stream by once a
// block. Many would come from memory, so they come as they are, and a task is some panels: it transforms
// chunk after chunk of their channels into L2, for all tiles of a wave, whose V the threads have made before.
//
// Both convolutions of a shared block may take turns, block by block, down a band of the image: the second
// reads what the first has just made.
#include "winograd.h"

#include "../common/parallel.h"
#include "conv_direct.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int kTaps = 9;
constexpr int kGroup = 4;  // panels whose sums are kept at once
// What V and M of a block take at most: a quarter of an L2, of 512 KiB or with AVX-512 1 MiB, beside the
// weights that pass by and what is fetched ahead.
constexpr int64_t kBlockBytes = kMaxPanels == 1 ? 128 * 1024 : 256 * 1024;
// But a weight is multiplied with so many tiles' frequencies: V from L3 costs less than reading the weights
// more often.
constexpr int64_t kLeastRows = 12;
// Tiles of a wave: what V of them takes in L3 at most, but so many that transforming the weights, which takes
// the time of 6 tiles' products, is a tenth of the whole.
constexpr int64_t kWaveBytes = 4 * 1024 * 1024;
constexpr int64_t kWaveTiles = 64;
// With fewer tiles a chunk of weights of half a group leaves more of L2 to V and M: 3 to 10 % faster for 16
// tiles, 5 % slower for 64.
constexpr int64_t kFewTiles = 32;
// Products that are summed from zero before they join the rest. Of 256 channels a running sum makes twice
// the error of four sums of 64.
constexpr int64_t kTerms = 64;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Span {
    int64_t begin = 0, end = 0;

    int64_t count() const { return end - begin; }
};

// The i-th of n nearly equal parts.
Span share(int64_t total, int64_t i, int64_t n) { return {total * i / n, total * (i + 1) / n}; }

template <typename T>
T* scratch(int slot, int64_t count) {
    return static_cast<T*>(thread_scratch(slot, count * static_cast<int64_t>(sizeof(T))));
}

template <typename Filter>
struct Geometry {
    static constexpr int kFrequencies = Filter::kFrequencies * Filter::kFrequencies;
    static constexpr int kWeightRows = Filter::kFrequencies - Filter::kShared + 1;
    static constexpr int kWeights = kWeightRows * kWeightRows;

    const Winograd& a;
    int64_t tiles_h = divide_up(a.out_h, Filter::kOut), tiles_w = divide_up(a.out_w, Filter::kOut);
    int64_t tiles = a.n * tiles_h * tiles_w;
    int64_t panels = divide_up(a.out_c, kPanel);
    int64_t channels = divide_up(a.c, kPanel) * kPanel;  // of V, with padding

    // Of V and M.
    int64_t tile_bytes() const { return kFrequencies * (channels + min(panels, kGroup) * kPanel) * 4; }
};

// A block's V or M: [weight][tile][frequency of that weight][channel], so that a weight's products are one
// matrix product.
template <typename Filter>
struct Layout {
    using G = Geometry<Filter>;

    int64_t tiles, row;  // floats of a tile at one frequency

    // Between weights is a gap, for a power of two would have them meet in few sets of the cache.
    static constexpr int kGap = kPanel;

    int64_t floats() const { return G::kFrequencies * tiles * row + G::kWeights * kGap; }

    // Of one dimension: the first frequency of a weight, and how many it has.
    static constexpr int first(int weight) { return weight == 0 ? 0 : weight + Filter::kShared - 1; }
    static constexpr int shared(int weight) { return weight == 0 ? Filter::kShared : 1; }

    // Frequencies of a weight, from 0 to kWeights.
    static constexpr int frequencies(int weight) {
        return shared(weight / G::kWeightRows) * shared(weight % G::kWeightRows);
    }

    int64_t start(int weight) const {
        const int y = weight / G::kWeightRows, x = weight % G::kWeightRows;
        return (first(y) * Filter::kFrequencies + shared(y) * first(x)) * tiles * row + weight * kGap;
    }

    // Where a tile's frequencies are.
    void pointers(float* base, int64_t tile, float* (&at)[G::kFrequencies]) const {
        for (int weight = 0; weight < G::kWeights; ++weight) {
            const int y = weight / G::kWeightRows, x = weight % G::kWeightRows;
            float* next = base + start(weight) + tile * frequencies(weight) * row;
            for (int i = 0; i < shared(y); ++i) {
                for (int j = 0; j < shared(x); ++j, next += row) {
                    at[(first(y) + i) * Filter::kFrequencies + first(x) + j] = next;
                }
            }
        }
    }
};

// Where a tile's first output is, and the first of its window's inputs.
struct Place {
    int64_t n, y, x, in_y, in_x;
};

template <typename Filter>
Place place_of(const Geometry<Filter>& g, int64_t tile) {
    const int64_t row = tile / g.tiles_w, y = row % g.tiles_h, x = tile % g.tiles_w;
    return {row / g.tiles_h, y * Filter::kOut, x * Filter::kOut, y * Filter::kStep - Filter::kPadding,
            x * Filter::kStep - Filter::kPadding};
}

// The transform of `count` channels of one tile from channel `c`, up to kLanes, from the pixels of its window
// to what is behind `at`.
template <typename Filter, typename T>
inline __attribute__((always_inline)) void transform_vector(const T* const* from, int64_t c, int count,
                                                            int64_t at, float* const* to) {
    constexpr int kIn = Filter::kIn, kFrequencies = Filter::kFrequencies;
    vf half[kIn][kFrequencies];
#pragma GCC unroll 9
    for (int row = 0; row < kIn; ++row) {
        vf in[kIn];
#pragma GCC unroll 9
        for (int column = 0; column < kIn; ++column) {
            in[column] = load_up_to(from[row * kIn + column] + c, count);
        }
        Filter::input(in, half[row]);
    }
#pragma GCC unroll 9
    for (int column = 0; column < kFrequencies; ++column) {
        vf in[kIn], out[kFrequencies];
#pragma GCC unroll 9
        for (int row = 0; row < kIn; ++row) in[row] = half[row][column];
        Filter::input(in, out);
#pragma GCC unroll 9
        for (int row = 0; row < kFrequencies; ++row) store(to[row * kFrequencies + column] + at, out[row]);
    }
}

// V of some channels of some tiles; that of tile `first` is the first in `v`. Pixels beyond the image are one
// of zeros.
template <typename Filter, typename T>
void transform_input(const Geometry<Filter>& g, Span tiles, Span channels, const Layout<Filter>& layout,
                     int64_t first, float* v) {
    constexpr int kIn = Filter::kIn;
    const Winograd& a = g.a;
    T* zeros = scratch<T>(4, a.c);
    for (int64_t c = 0; c < a.c; ++c) zeros[c] = T{};
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        const Place p = place_of(g, t);
        const T* image = static_cast<const T*>(a.x) + p.n * a.h * a.w * a.c;
        const T* from[kIn * kIn];
        for (int i = 0; i < kIn * kIn; ++i) {
            const int64_t y = p.in_y + i / kIn, x = p.in_x + i % kIn;
            from[i] = y >= 0 && y < a.h && x >= 0 && x < a.w ? image + (y * a.w + x) * a.c : zeros;
        }
        float* to[g.kFrequencies];
        layout.pointers(v, t - first, to);
        for (int64_t c = channels.begin; c < channels.end; c += kLanes) {
            const int64_t at = c - channels.begin;
            if (c + kLanes <= channels.end) {
                transform_vector<Filter>(from, c, kLanes, at, to);
            } else {
                transform_vector<Filter>(from, c, static_cast<int>(channels.end - c), at, to);
            }
        }
    }
}

// Lines of memory that a product fetches into L2, one a step: what the transforms touch next, which would
// come from L3 or memory while nothing is multiplied. 13 % of the time of 64 channels at 128 x 128.
class Ahead {
   public:
    Ahead() : next_(scratch<const void*>(kSlot, kMost + 1)), end_(next_), limit_(next_ + kMost) {
        *end_ = this;
    }

    void add(const void* data, int64_t bytes) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
        for (uintptr_t line = begin / kLine * kLine; line < end && end_ < limit_; line += kLine) {
            *end_++ = reinterpret_cast<const void*>(line);
        }
        *end_ = data;
    }

    // The first `bytes` of each of a row of pixels.
    void add_row(const char* data, int64_t pixels, int64_t pixel, int64_t bytes) {
        if (pixel == bytes) return add(data, pixels * bytes);
        for (int64_t i = 0; i < pixels; ++i) add(data + i * pixel, bytes);
    }

    // For so many steps, the first of which fetches *lines, and the next one what is `stride` behind it.
    const void* const* take(int64_t steps, int64_t* stride) {
        const void* const* lines = next_;
        *stride = end_ - next_ >= steps;
        next_ += *stride * steps;
        return lines;
    }

   private:
    static constexpr int kSlot = 2;
    static constexpr int64_t kMost = 4096;
    static constexpr uintptr_t kLine = 64;
    const void **next_, **end_, **limit_;
};

// A block's V and M of one weight. Rows are tiles and their frequencies.
struct Product {
    const float *v, *weight;
    float* m;
    int64_t rows, c, weight_panel;
    int64_t v_row, m_row;  // floats between rows
    bool add;              // to what M holds
};

// The products of one chunk of channels, summed from zero.
template <int kPixels, int kPanels>
inline __attribute__((always_inline)) void accumulate_chunk(const Product& p, const float* input,
                                                            const float* weight, int64_t run, Ahead& ahead,
                                                            Sums<kPixels, kPanels>& out) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const int64_t row = p.v_row, panel = p.weight_panel;
    int64_t stride;
    const void* const* lines = ahead.take(run, &stride);
    Sums<kPixels, kPanels> sums{};
    for (int64_t k = 0; k < run; ++k, ++input, weight += kPanel, lines += stride) {
        __builtin_prefetch(*lines, 0, 2);
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
void multiply_rows(const Product& p, int64_t first, Ahead& ahead) {
    constexpr int kVectors = kPanels * kPanelVectors;
    const int64_t chunks = divide_up(p.c, kTerms), m_row = p.m_row;
    for (int64_t i = 0; i < chunks; ++i) {
        const Span c = share(p.c, i, chunks);
        Sums<kPixels, kPanels> sums;
        accumulate_chunk(p, p.v + first * p.v_row + c.begin, p.weight + c.begin * kPanel, c.count(), ahead,
                         sums);
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
void multiply_rows_of(int64_t count, const Product& p, int64_t first, Ahead& ahead) {
    if constexpr (kPixels > 0) {
        if (count == kPixels) return multiply_rows<kPixels, kPanels>(p, first, ahead);
        multiply_rows_of<kPanels, kPixels - 1>(count, p, first, ahead);
    }
}

// M of all rows for `panels` panels, at most kMaxPanels.
template <int kPanels = kMaxPanels>
void multiply_panels(int64_t panels, const Product& p, Ahead& ahead) {
    if constexpr (kPanels > 0) {
        if (panels != kPanels) return multiply_panels<kPanels - 1>(panels, p, ahead);
        const int64_t parts = divide_up(p.rows, tile_pixels(kPanels));
        for (int64_t i = 0; i < parts; ++i) {
            const Span rows = share(p.rows, i, parts);
            multiply_rows_of<kPanels>(rows.count(), p, rows.begin, ahead);
        }
    }
}

// The rows of one tile's outputs, for the panel from channel `at` of M.
template <typename Filter>
void transform_output(const float* const* from, int64_t at, Sums<Filter::kOut, 1> (&rows)[Filter::kOut]) {
    constexpr int kOut = Filter::kOut, kFrequencies = Filter::kFrequencies;
    for (int v = 0; v < kPanelVectors; ++v, at += kLanes) {
        vf half[kOut][kFrequencies];
#pragma GCC unroll 9
        for (int column = 0; column < kFrequencies; ++column) {
            vf in[kFrequencies], out[kOut];
#pragma GCC unroll 9
            for (int row = 0; row < kFrequencies; ++row)
                in[row] = load(from[row * kFrequencies + column] + at);
            Filter::output(in, out);
#pragma GCC unroll 8
            for (int row = 0; row < kOut; ++row) half[row][column] = out[row];
        }
#pragma GCC unroll 8
        for (int row = 0; row < kOut; ++row) {
            vf out[kOut];
            Filter::output(half[row], out);
#pragma GCC unroll 8
            for (int column = 0; column < kOut; ++column) rows[row].v[column][v] = out[column];
        }
    }
}

// finish() for a count of pixels known at run time.
template <int kOut, typename T, int kPixels = kOut>
void finish_row(int64_t pixels, const Sums<kOut, 1>& row, const Epilogue<T>& e) {
    if constexpr (kPixels > 0) {
        if (pixels < kPixels) return finish_row<kOut, T, kPixels - 1>(pixels, row, e);
        Sums<kPixels, 1> some;
        for (int p = 0; p < kPixels; ++p) {
            for (int v = 0; v < kPanelVectors; ++v) some.v[p][v] = row.v[p][v];
        }
        finish(some, e);
    }
}

// The outputs of one tile for `panels` panels from output channel `oc`.
template <typename Filter, typename T>
void finish_tile(const Winograd& a, const Place& place, int64_t oc, int64_t panels,
                 const float* const* from) {
    constexpr int kOut = Filter::kOut;
    const int64_t height = min(kOut, a.out_h - place.y), width = min(kOut, a.out_w - place.x);
    const int64_t start = place.n * a.stride_n + place.y * a.stride_h + place.x * a.stride_w;
    for (int64_t i = 0; i < panels; ++i, oc += kPanel) {
        Sums<kOut, 1> rows[kOut];
        transform_output<Filter>(from, i * kPanel, rows);
        Epilogue<T> e;
        e.scale = a.scale ? a.scale + oc : nullptr;
        e.shift = a.shift ? a.shift + oc : nullptr;
        e.pixel = a.stride_w;
        e.channels = static_cast<int>(min(kPanel, a.out_c - oc));
        e.slope = a.slope;
        for (int64_t y = 0; y < height; ++y) {
            const int64_t at = start + y * a.stride_h + oc;
            e.residual = a.residual ? static_cast<const T*>(a.residual) + at : nullptr;
            e.skip = a.skip ? static_cast<const T*>(a.skip) + at : nullptr;
            e.out = static_cast<T*>(a.out) + at;
            finish_row<kOut>(width, rows[y], e);
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
void multiply(const Layout<Filter>& v_layout, const float* v, const Weights& weights, int64_t c, bool add,
              const Layout<Filter>& m_layout, float* m, Ahead& ahead) {
    const int64_t panels = m_layout.row / kPanel;
    for (int weight = 0; weight < Geometry<Filter>::kWeights; ++weight) {
        for (int64_t i = 0; i < panels; i += kMaxPanels) {
            Product p;
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

// The outputs of a block's tiles for some panels from their M.
template <typename Filter, typename T>
void transform_outputs(const Geometry<Filter>& g, Span tiles, Span panels, float* m) {
    const Layout<Filter> layout{tiles.count(), panels.count() * kPanel};
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        float* from[g.kFrequencies];
        layout.pointers(m, t - tiles.begin, from);
        finish_tile<Filter, T>(g.a, place_of(g, t), panels.begin * kPanel, panels.count(), from);
    }
}

// Calls row(place, count) for the runs of tiles that are neighbours in a row of the image.
template <typename Filter, typename Row>
void each_row(const Geometry<Filter>& g, Span tiles, const Row& row) {
    for (int64_t t = tiles.begin; t < tiles.end;) {
        const int64_t count = min(tiles.end - t, g.tiles_w - t % g.tiles_w);
        row(place_of(g, t), count);
        t += count;
    }
}

// What the output transform of these tiles is to read and write.
template <typename Filter, typename T>
void fetch_outputs(const Geometry<Filter>& g, Span tiles, Span panels, Ahead& ahead) {
    constexpr int64_t kSize = sizeof(T);
    const Winograd& a = g.a;
    const void* const bases[] = {a.out, a.residual, a.skip};
    const int64_t oc = panels.begin * kPanel, bytes = (min(panels.end * kPanel, a.out_c) - oc) * kSize;
    each_row(g, tiles, [&](const Place& p, int64_t count) {
        const int64_t pixels = min(count * Filter::kOut, a.out_w - p.x);
        for (int64_t y = p.y; y < min(p.y + Filter::kOut, a.out_h); ++y) {
            const int64_t at = (p.n * a.stride_n + y * a.stride_h + p.x * a.stride_w + oc) * kSize;
            for (const void* base : bases) {
                if (!base) continue;
                ahead.add_row(static_cast<const char*>(base) + at, pixels, a.stride_w * kSize, bytes);
            }
        }
    });
}

// The windows of these tiles.
template <typename Filter, typename T>
void fetch_inputs(const Geometry<Filter>& g, Span tiles, Ahead& ahead) {
    constexpr int64_t kSize = sizeof(T);
    const Winograd& a = g.a;
    each_row(g, tiles, [&](const Place& p, int64_t count) {
        const int64_t begin = max(p.in_x, 0),
                      end = min(p.in_x + (count - 1) * Filter::kStep + Filter::kIn, a.w);
        for (int64_t y = max(p.in_y, 0); y < min(p.in_y + Filter::kIn, a.h); ++y) {
            const T* row = static_cast<const T*>(a.x) + ((p.n * a.h + y) * a.w + begin) * a.c;
            ahead.add(row, max(end - begin, 0) * a.c * kSize);
        }
    });
}

// How tiles and panels are cut into tasks: blocks that follow one another in bands, groups of panels in
// parts.
struct Cut {
    int64_t blocks, bands, parts;
};

// Tiles of a block whose weights are used often enough.
template <typename Filter>
int64_t least_tiles() {
    return divide_up(kLeastRows * Geometry<Filter>::kWeights, Geometry<Filter>::kFrequencies);
}

// Tiles of a block that L2 has room for.
template <typename Filter>
int64_t most_tiles(const Geometry<Filter>& g) {
    const int64_t whole = tile_pixels(kMaxPanels);
    return max(least_tiles<Filter>(), kBlockBytes / g.tile_bytes() / whole * whole);
}

// Blocks as large as caches and the threads' share allow; few of them also share out the panels.
template <typename Filter>
Cut cut(const Geometry<Filter>& g) {
    int64_t blocks = divide_up(g.tiles, most_tiles(g));
    if (g.a.threads == 1) return {blocks, 1, 1};
    const int64_t tasks = 4 * g.a.threads;
    blocks = max(blocks, min(tasks, g.tiles / least_tiles<Filter>()));
    const int64_t bands = min(tasks, blocks);
    return {divide_up(blocks, bands) * bands, bands, min(divide_up(g.panels, kGroup), tasks / bands)};
}

// Every group of panels.
template <typename Filter>
Span all_groups(const Geometry<Filter>& g) {
    return {0, divide_up(g.panels, kGroup)};
}

// The outputs of one block for some groups of panels; fetch_next adds what the next block's transform reads.
template <typename Filter, typename T, typename Fetch>
void convolve_block(const Geometry<Filter>& g, Span tiles, Span groups, const Fetch& fetch_next) {
    const Winograd& a = g.a;
    const Layout<Filter> v_layout{tiles.count(), g.channels};
    float* v = scratch<float>(0, v_layout.floats());
    float* m = scratch<float>(1, Layout<Filter>{tiles.count(), min(g.panels, kGroup) * kPanel}.floats());
    const int64_t floats = a.c * kPanel;
    transform_input<Filter, T>(g, tiles, {0, a.c}, v_layout, tiles.begin, v);
    for (int64_t i = groups.begin; i < groups.end; ++i) {
        const Span panels = share(g.panels, i, all_groups(g).end);
        Ahead ahead;
        fetch_outputs<Filter, T>(g, tiles, panels, ahead);
        if (i + 1 == groups.end) fetch_next(ahead);
        const Weights weights{a.weight + panels.begin * g.kWeights * floats, g.kWeights * floats, floats};
        const Layout<Filter> m_layout{tiles.count(), panels.count() * kPanel};
        multiply<Filter>(v_layout, v, weights, a.c, false, m_layout, m, ahead);
        transform_outputs<Filter, T>(g, tiles, panels, m);
    }
}

// Blocks whose V and M stay in L2, with weights that are transformed already.
template <typename Filter, typename T>
void run_bands(const Geometry<Filter>& g) {
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

// The 3x3 weights of a panel and channel, as ops/conv_bn_act.py packs them.
struct Taps {
    const float* data;
    int64_t tap;  // floats between taps
};

Taps taps_of(const Winograd& a, int64_t panel, int64_t c) {
    const int64_t first = c / a.chunk * a.chunk;
    return {a.weight + ((panel * a.c + first) * kTaps + c - first) * kPanel,
            min(a.chunk, a.c - first) * kPanel};
}

// G w Gt of one panel and channel, to u, u + weight, ...
template <typename Filter>
void transform_weight(const Taps& taps, float* u, int64_t weight) {
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
void each_run(const Winograd& a, Span panels, Span channels, const Run& run) {
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
void convolve_wave(const Wave<Filter>& wave, Span panels, const float* v) {
    const Winograd& a = wave.g.a;
    const Layout<Filter> m_layout{wave.tiles.count(), panels.count() * kPanel};
    float* m = scratch<float>(1, m_layout.floats());
    const int64_t weight = panels.count() * wave.widest * kPanel + kPanel;
    float* u = scratch<float>(3, wave.g.kWeights * weight);
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
void run_waves(const Geometry<Filter>& g) {
    const Winograd& a = g.a;
    const int64_t most = max(kWaveTiles, kWaveBytes / (g.kFrequencies * g.channels * 4));
    const int64_t waves = divide_up(g.tiles, most);
    for (int64_t i = 0; i < waves; ++i) {
        const Wave<Filter> wave{g, share(g.tiles, i, waves)};
        const int64_t tiles = wave.tiles.count(), parts = min(tiles, 4 * a.threads);
        float* v = scratch<float>(0, wave.chunks * wave.layout.floats());
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

template <typename Filter, typename T>
void run(const Winograd& a) {
    const Geometry<Filter> g{a};
    if (g.tiles == 0) return;
    if (a.chunk > 0) {
        run_waves<Filter, T>(g);
    } else {
        run_bands<Filter, T>(g);
    }
}

template <typename T>
void run_filter(const Winograd& a) {
    if (a.transposed) {
        run<FilterTransposed, T>(a);
    } else if (a.stride == 2) {
        run<FilterStride2, T>(a);
    } else if (a.tile == 4) {
        run<Filter4, T>(a);
    } else {
        run<Filter2, T>(a);
    }
}

// Nearly equal blocks of some tiles, one after another.
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

// A band's hidden tiles and outputs by turns, each hidden block as late as the outputs that read it allow.
class Turns {
   public:
    struct Turn {
        bool hidden;
        Span tiles;  // none after the last
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

// One of a shared block's convolutions, from and to dense memory.
Winograd convolution(const WinogradBlock& b, const void* x, const float* scale, const float* shift, void* out,
                     float slope) {
    Winograd a{};
    a.x = x;
    a.weight = b.weight;
    a.scale = scale;
    a.shift = shift;
    a.out = out;
    a.dtype = b.dtype;
    a.n = b.n;
    a.h = a.out_h = b.h;
    a.w = a.out_w = b.w;
    a.c = a.out_c = a.stride_w = b.c;
    a.stride_h = b.w * b.c;
    a.stride_n = b.h * a.stride_h;
    a.slope = slope;
    return a;
}

// One share of the hidden tiles of the two rows at each edge between bands.
template <typename T>
void make_edges(const Geometry<Filter4>& g, int64_t rows, int64_t bands, Span mine) {
    const int64_t edge = 2 * g.tiles_w, most = most_tiles(g);
    for (int64_t at = mine.begin; at < mine.end;) {
        const int64_t i = at / edge, end = min((i + 1) * edge, mine.end);
        const int64_t start = (share(rows, i + 1, bands).begin - 1) * g.tiles_w - i * edge;
        for (Blocks blocks({at + start, end + start}, most); !blocks.done();) {
            convolve_block<Filter4, T>(g, blocks.take(), all_groups(g), [](Ahead&) {});
        }
        at = end;
    }
}

// Both convolutions for a band of tile rows, of which `made` are hidden ones to be made.
template <typename T>
void run_band(const Geometry<Filter4>& first, const Geometry<Filter4>& second, Span made, Span band) {
    const int64_t row = first.tiles_w, most = most_tiles(first);
    Turns turns(Blocks({made.begin * row, made.end * row}, most),
                Blocks({band.begin * row, band.end * row}, most), row);
    for (Turns::Turn turn = turns.next(), after; turn.tiles.count() > 0; turn = after) {
        after = turns.next();
        const Geometry<Filter4>& g = turn.hidden ? first : second;
        convolve_block<Filter4, T>(g, turn.tiles, all_groups(g), [&](Ahead& ahead) {
            fetch_inputs<Filter4, T>(after.hidden ? first : second, after.tiles, ahead);
        });
    }
}

// Bands of tile rows, one a thread. Of hidden rows both bands read the two at the edge between them, which
// all threads make first.
template <typename T>
void run_block(const WinogradBlock& b) {
    const Winograd to_hidden = convolution(b, b.x, b.scale1, b.shift1, b.hidden, b.slope);
    Winograd to_out = convolution(b, b.hidden, b.scale2, b.shift2, b.out, 0);
    to_out.residual = b.x;
    to_out.skip = b.skip ? b.x : nullptr;
    const Geometry<Filter4> first{to_hidden}, second{to_out};
    const int64_t rows = b.n * first.tiles_h, bands = max(1, min(b.threads, rows / 2));
    const int64_t at_edges = (bands - 1) * 2 * first.tiles_w;
    parallel_for(b.threads, min(b.threads, at_edges), [&](int64_t i) {
        make_edges<T>(first, rows, bands, share(at_edges, i, min(b.threads, at_edges)));
    });
    parallel_for(b.threads, bands, [&](int64_t i) {
        const Span band = share(rows, i, bands);
        run_band<T>(first, second, {band.begin + (i > 0), band.end - (i + 1 < bands)}, band);
    });
}

}  // namespace

void winograd_block(const WinogradBlock& args) {
    if (args.dtype == DType::f32) {
        run_block<float>(args);
    } else {
        run_block<bf16>(args);
    }
}

void winograd(const Winograd& args) {
    if (args.dtype == DType::f32) {
        run_filter<float>(args);
    } else {
        run_filter<bf16>(args);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
