// 3x3 convolutions of padding 1, and transposed ones of stride 2, with fewer multiplications.
//
// A task is a block of tiles and a range of output channels. It transforms the block's input once, into
// V, and for each group of weight panels multiplies, frequency after frequency, into M, which the output
// transform and the epilogue turn into outputs. Weights stream by once a task; V and M stay in cache.
#include "winograd.h"

#include "../common/parallel.h"
#include "conv_direct.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int kGroup = 4;  // panels whose sums are kept at once
// What V and M of a block take at most: half of an L2, of 512 KiB or with AVX-512 1 MiB, beside the weights
// that pass by.
constexpr int64_t kBlockBytes = kMaxPanels == 1 ? 256 * 1024 : 512 * 1024;
// But a weight is multiplied with so many tiles' frequencies: a byte of weights is worth half as many
// operations, and comes from L3, or where there are more than kMany of them from memory; V from L3 costs
// less.
constexpr int64_t kLeastRows = 24, kLeastRowsOfMany = 64;
constexpr int64_t kMany = 16 * 1024 * 1024;
// Products that are summed from zero before they join the rest. Of 256 channels a running sum makes twice
// the error of four sums of 64.
constexpr int64_t kTerms = 64;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

    int64_t weight_bytes() const { return kWeights * a.c * panels * kPanel * 4; }

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

// How tiles and panels are cut into tasks.
struct Cut {
    int64_t blocks, groups;  // groups of panels
};

// Blocks as large as caches and the threads' share allow; few of them also share out the panels.
template <typename Filter>
Cut cut(const Geometry<Filter>& g) {
    const int64_t rows = g.weight_bytes() > kMany ? kLeastRowsOfMany : kLeastRows;
    const int64_t least = divide_up(rows * g.kWeights, g.kFrequencies);
    const int64_t largest = max(least, kBlockBytes / g.tile_bytes());
    int64_t blocks = divide_up(g.tiles, largest);
    if (g.a.threads == 1) return {blocks, 1};
    const int64_t tasks = 4 * g.a.threads;
    blocks = max(blocks, min(tasks, g.tiles / least));
    return {blocks, min(divide_up(g.panels, kGroup), divide_up(tasks, blocks))};
}

// The transform of up to kLanes channels of one tile, from the pixels of its window.
template <typename Filter, typename T>
inline __attribute__((always_inline)) void transform_vector(const T* const* from, int64_t c, int count,
                                                            float* const* to) {
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
        for (int row = 0; row < kFrequencies; ++row) store(to[row * kFrequencies + column] + c, out[row]);
    }
}

// V of the tiles [first, first + count). Pixels beyond the image are one of zeros.
template <typename Filter, typename T>
void transform_input(const Geometry<Filter>& g, int64_t first, int64_t count, float* v) {
    constexpr int kIn = Filter::kIn;
    const Winograd& a = g.a;
    const Layout<Filter> layout{count, g.channels};
    T* zeros = static_cast<T*>(thread_scratch(4, a.c * static_cast<int64_t>(sizeof(T))));
    for (int64_t c = 0; c < a.c; ++c) zeros[c] = T{};
    for (int64_t t = 0; t < count; ++t) {
        const Place p = place_of(g, first + t);
        const T* image = static_cast<const T*>(a.x) + p.n * a.h * a.w * a.c;
        const T* from[kIn * kIn];
        for (int i = 0; i < kIn * kIn; ++i) {
            const int64_t y = p.in_y + i / kIn, x = p.in_x + i % kIn;
            from[i] = y >= 0 && y < a.h && x >= 0 && x < a.w ? image + (y * a.w + x) * a.c : zeros;
        }
        float* to[g.kFrequencies];
        layout.pointers(v, t, to);
        int64_t c = 0;
        for (; c + kLanes <= a.c; c += kLanes) transform_vector<Filter>(from, c, kLanes, to);
        if (c < a.c) transform_vector<Filter>(from, c, static_cast<int>(a.c - c), to);
    }
}

// A block's V and M of one weight. Rows are tiles and their frequencies.
struct Product {
    const float *v, *weight;
    float* m;
    int64_t rows, c, weight_panel;
    int64_t v_row, m_row;  // floats between rows
};

// M of `kPixels` rows and kPanels panels of one weight: chunks of channels, each summed from zero.
template <int kPixels, int kPanels>
void multiply_rows(const Product& p, int64_t first) {
    constexpr int kVectors = kPanels * kPanelVectors;
    float* m = p.m + first * p.m_row;
    const int64_t chunks = divide_up(p.c, kTerms);
    for (int64_t i = 0; i < chunks; ++i) {
        const int64_t begin = i * p.c / chunks, end = (i + 1) * p.c / chunks;
        Tile tile{};
        tile.input = p.v + first * p.v_row + begin;
        tile.input_pixel = p.v_row;
        tile.weight = p.weight + begin * kPanel;
        tile.weight_panel = p.weight_panel;
        tile.kernel_h = 1;
        tile.run = end - begin;
        Sums<kPixels, kPanels> sums;
        accumulate(tile, sums);
        for (int t = 0; t < kPixels; ++t) {
            for (int v = 0; v < kVectors; ++v) {
                float* to = m + t * p.m_row + v * kLanes;
                store(to, i == 0 ? sums.v[t][v] : load(to) + sums.v[t][v]);
            }
        }
    }
}

// Calls multiply_rows<count, kPanels> for a count known at run time.
template <int kPanels, int kPixels = tile_pixels(kPanels)>
void multiply_rows_of(int64_t count, const Product& p, int64_t first) {
    if constexpr (kPixels > 0) {
        if (count == kPixels) return multiply_rows<kPixels, kPanels>(p, first);
        multiply_rows_of<kPanels, kPixels - 1>(count, p, first);
    }
}

// M of all rows for `panels` panels, at most kMaxPanels.
template <int kPanels = kMaxPanels>
void multiply_panels(int64_t panels, const Product& p) {
    if constexpr (kPanels > 0) {
        if (panels != kPanels) return multiply_panels<kPanels - 1>(panels, p);
        const int64_t parts = divide_up(p.rows, tile_pixels(kPanels));
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t first = i * p.rows / parts, next = (i + 1) * p.rows / parts;
            multiply_rows_of<kPanels>(next - first, p, first);
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

// The outputs of tiles [first, first + count) for the panels [panel, panel + panels) from their V.
template <typename Filter, typename T>
void convolve_group(const Geometry<Filter>& g, int64_t first, int64_t count, int64_t panel, int64_t panels,
                    const float* v, float* m) {
    const Winograd& a = g.a;
    const Layout<Filter> v_layout{count, g.channels}, m_layout{count, panels * kPanel};
    const int64_t floats = a.c * kPanel;
    for (int weight = 0; weight < g.kWeights; ++weight) {
        for (int64_t i = 0; i < panels; i += kMaxPanels) {
            Product p;
            p.v = v + v_layout.start(weight);
            p.weight = a.weight + ((panel + i) * g.kWeights + weight) * floats;
            p.m = m + m_layout.start(weight) + i * kPanel;
            p.rows = count * m_layout.frequencies(weight);
            p.c = a.c;
            p.weight_panel = g.kWeights * floats;
            p.v_row = v_layout.row;
            p.m_row = m_layout.row;
            multiply_panels(min(kMaxPanels, panels - i), p);
        }
    }
    for (int64_t t = 0; t < count; ++t) {
        float* from[g.kFrequencies];
        m_layout.pointers(m, t, from);
        finish_tile<Filter, T>(a, place_of(g, first + t), panel * kPanel, panels, from);
    }
}

template <typename Filter, typename T>
void run(const Winograd& a) {
    const Geometry<Filter> g{a};
    if (g.tiles == 0) return;
    const Cut c = cut(g);
    const int64_t groups = divide_up(g.panels, kGroup);
    parallel_for(a.threads, c.blocks * c.groups, [&](int64_t task) {
        const int64_t block = task / c.groups, part = task % c.groups;
        const int64_t first = g.tiles * block / c.blocks, next = g.tiles * (block + 1) / c.blocks;
        const Layout<Filter> v_layout{next - first, g.channels};
        const Layout<Filter> m_layout{next - first, min(g.panels, kGroup) * kPanel};
        float* v = static_cast<float*>(thread_scratch(0, v_layout.floats() * 4));
        float* m = static_cast<float*>(thread_scratch(1, m_layout.floats() * 4));
        transform_input<Filter, T>(g, first, next - first, v);
        for (int64_t i = groups * part / c.groups; i < groups * (part + 1) / c.groups; ++i) {
            const int64_t panel = g.panels * i / groups, end = g.panels * (i + 1) / groups;
            convolve_group<Filter, T>(g, first, next - first, panel, end - panel, v, m);
        }
    });
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

}  // namespace

void winograd(const Winograd& args) {
    if (args.dtype == DType::f32) {
        run_filter<float>(args);
    } else {
        run_filter<bf16>(args);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
