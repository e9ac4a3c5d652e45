// 3x3 convolutions of stride 1 and padding 1 with fewer multiplications.
//
// A task is a block of tiles and a range of output channels. It transforms the block's input once, into
// V [frequency][tile][channel], and for each group of weight panels multiplies, frequency after
// frequency, into M [frequency][tile][group], which the output transform and the epilogue turn into
// outputs. Weights stream by once a task; V and M stay in cache.
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
// But a block has these tiles: a byte of weights is worth tiles / 2 operations, and comes from L3, or where
// there are more than kMany of them from memory; V from L3 costs less.
constexpr int64_t kLeastTiles = 24, kLeastTilesOfMany = 64;
constexpr int64_t kMany = 16 * 1024 * 1024;
// Products that are summed from zero before they join the rest. Of 256 channels a running sum makes twice
// the error of four sums of 64.
constexpr int64_t kTerms = 64;

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Floats from one frequency to the next: not a power of two, which would meet in few sets of the cache.
int64_t padded(int64_t floats) { return divide_up(floats, kPanel) * kPanel + kPanel; }

template <int kTile>
struct Geometry {
    static constexpr int kWindow = kTile + 2, kFrequencies = kWindow * kWindow;

    const Winograd& a;
    int64_t tiles_h = divide_up(a.h, kTile), tiles_w = divide_up(a.w, kTile);
    int64_t tiles = a.n * tiles_h * tiles_w;
    int64_t panels = divide_up(a.out_c, kPanel);
    int64_t channels = divide_up(a.c, kPanel) * kPanel;  // of V, with padding

    int64_t weight_bytes() const { return kFrequencies * a.c * panels * kPanel * 4; }

    // Of V and M.
    int64_t tile_bytes() const { return kFrequencies * (channels + min(panels, kGroup) * kPanel) * 4; }
};

// Where a tile's first output is.
struct Place {
    int64_t n, y, x;
};

template <int kTile>
Place place_of(const Geometry<kTile>& g, int64_t tile) {
    const int64_t row = tile / g.tiles_w;
    return {row / g.tiles_h, row % g.tiles_h * kTile, tile % g.tiles_w * kTile};
}

// How tiles and panels are cut into tasks.
struct Cut {
    int64_t blocks, groups;  // groups of panels
};

// Blocks as large as caches and the threads' share allow; few of them also share out the panels.
template <int kTile>
Cut cut(const Geometry<kTile>& g) {
    const int64_t least = g.weight_bytes() > kMany ? kLeastTilesOfMany : kLeastTiles;
    const int64_t largest = max(least, kBlockBytes / g.tile_bytes());
    int64_t blocks = divide_up(g.tiles, largest);
    if (g.a.threads == 1) return {blocks, 1};
    const int64_t tasks = 4 * g.a.threads;
    blocks = max(blocks, min(tasks, g.tiles / least));
    return {blocks, min(divide_up(g.panels, kGroup), divide_up(tasks, blocks))};
}

// The transform of up to kLanes channels of one tile. kInside: the whole window is within the image.
template <int kTile, bool kInside, typename T>
void transform_vector(const Winograd& a, const T* image, int64_t y, int64_t x, int64_t c, int count, float* v,
                      int64_t frequency) {
    constexpr int kWindow = kTile + 2;
    vf half[kWindow][kWindow];
#pragma GCC unroll 6
    for (int column = 0; column < kWindow; ++column) {
        vf in[kWindow], out[kWindow];
#pragma GCC unroll 6
        for (int row = 0; row < kWindow; ++row) {
            const int64_t at_y = y + row, at_x = x + column;
            const bool inside = kInside || (at_y >= 0 && at_y < a.h && at_x >= 0 && at_x < a.w);
            in[row] = inside ? load_up_to(image + (at_y * a.w + at_x) * a.c + c, count) : vf{};
        }
        Transform<kTile>::input(in, out);
#pragma GCC unroll 6
        for (int row = 0; row < kWindow; ++row) half[row][column] = out[row];
    }
#pragma GCC unroll 6
    for (int row = 0; row < kWindow; ++row) {
        vf out[kWindow];
        Transform<kTile>::input(half[row], out);
#pragma GCC unroll 6
        for (int column = 0; column < kWindow; ++column) {
            store(v + (row * kWindow + column) * frequency, out[column]);
        }
    }
}

template <int kTile, bool kInside, typename T>
void transform_tile(const Winograd& a, const T* image, int64_t y, int64_t x, float* v, int64_t frequency) {
    int64_t c = 0;
    for (; c + kLanes <= a.c; c += kLanes) {
        transform_vector<kTile, kInside>(a, image, y, x, c, kLanes, v + c, frequency);
    }
    if (c < a.c) {
        transform_vector<kTile, kInside>(a, image, y, x, c, static_cast<int>(a.c - c), v + c, frequency);
    }
}

// V of the tiles [first, first + count).
template <int kTile, typename T>
void transform_input(const Geometry<kTile>& g, int64_t first, int64_t count, float* v) {
    const Winograd& a = g.a;
    const int64_t frequency = padded(count * g.channels);
    for (int64_t t = 0; t < count; ++t, v += g.channels) {
        const Place p = place_of(g, first + t);
        const T* image = static_cast<const T*>(a.x) + p.n * a.h * a.w * a.c;
        const bool inside = p.y > 0 && p.x > 0 && p.y + kTile < a.h && p.x + kTile < a.w;
        if (inside) {
            transform_tile<kTile, true>(a, image, p.y - 1, p.x - 1, v, frequency);
        } else {
            transform_tile<kTile, false>(a, image, p.y - 1, p.x - 1, v, frequency);
        }
    }
}

// A block's V and M, and the weights it is multiplied with.
struct Product {
    const float *v, *weight;
    float* m;
    int64_t tiles, channels, c, weight_panel;
    int64_t v_tile, m_tile;  // floats between tiles
};

// M of `kPixels` tiles and kPanels panels at one frequency: chunks of channels, each summed from zero.
template <int kPixels, int kPanels>
void multiply_tiles(const Product& p, int64_t first) {
    constexpr int kVectors = kPanels * kPanelVectors;
    float* m = p.m + first * p.m_tile;
    const int64_t chunks = divide_up(p.c, kTerms);
    for (int64_t i = 0; i < chunks; ++i) {
        const int64_t begin = i * p.c / chunks, end = (i + 1) * p.c / chunks;
        Tile tile{};
        tile.input = p.v + first * p.v_tile + begin;
        tile.input_pixel = p.v_tile;
        tile.weight = p.weight + begin * kPanel;
        tile.weight_panel = p.weight_panel;
        tile.kernel_h = 1;
        tile.run = end - begin;
        Sums<kPixels, kPanels> sums;
        accumulate(tile, sums);
        for (int t = 0; t < kPixels; ++t) {
            for (int v = 0; v < kVectors; ++v) {
                float* to = m + t * p.m_tile + v * kLanes;
                store(to, i == 0 ? sums.v[t][v] : load(to) + sums.v[t][v]);
            }
        }
    }
}

// Calls multiply_tiles<count, kPanels> for a count known at run time.
template <int kPanels, int kPixels = tile_pixels(kPanels)>
void multiply_tiles_of(int64_t count, const Product& p, int64_t first) {
    if constexpr (kPixels > 0) {
        if (count == kPixels) return multiply_tiles<kPixels, kPanels>(p, first);
        multiply_tiles_of<kPanels, kPixels - 1>(count, p, first);
    }
}

// M of all tiles for `panels` panels, at most kMaxPanels.
template <int kPanels = kMaxPanels>
void multiply_panels(int64_t panels, const Product& p) {
    if constexpr (kPanels > 0) {
        if (panels != kPanels) return multiply_panels<kPanels - 1>(panels, p);
        const int64_t parts = divide_up(p.tiles, tile_pixels(kPanels));
        for (int64_t i = 0; i < parts; ++i) {
            const int64_t first = i * p.tiles / parts, next = (i + 1) * p.tiles / parts;
            multiply_tiles_of<kPanels>(next - first, p, first);
        }
    }
}

// The rows of one tile's outputs, for one panel.
template <int kTile>
void transform_output(const float* m, int64_t frequency, Sums<kTile, 1> (&rows)[kTile]) {
    constexpr int kWindow = kTile + 2;
    for (int v = 0; v < kPanelVectors; ++v, m += kLanes) {
        vf half[kTile][kWindow];
#pragma GCC unroll 6
        for (int column = 0; column < kWindow; ++column) {
            vf in[kWindow], out[kTile];
#pragma GCC unroll 6
            for (int row = 0; row < kWindow; ++row) in[row] = load(m + (row * kWindow + column) * frequency);
            Transform<kTile>::output(in, out);
#pragma GCC unroll 4
            for (int row = 0; row < kTile; ++row) half[row][column] = out[row];
        }
#pragma GCC unroll 4
        for (int row = 0; row < kTile; ++row) {
            vf out[kTile];
            Transform<kTile>::output(half[row], out);
#pragma GCC unroll 4
            for (int column = 0; column < kTile; ++column) rows[row].v[column][v] = out[column];
        }
    }
}

// finish() for a count of pixels known at run time.
template <int kTile, typename T, int kPixels = kTile>
void finish_row(int64_t pixels, const Sums<kTile, 1>& row, const Epilogue<T>& e) {
    if constexpr (kPixels > 0) {
        if (pixels < kPixels) return finish_row<kTile, T, kPixels - 1>(pixels, row, e);
        Sums<kPixels, 1> some;
        for (int p = 0; p < kPixels; ++p) {
            for (int v = 0; v < kPanelVectors; ++v) some.v[p][v] = row.v[p][v];
        }
        finish(some, e);
    }
}

// The outputs of one tile for `panels` panels from output channel `oc`.
template <int kTile, typename T>
void finish_tile(const Winograd& a, const Place& place, int64_t oc, int64_t panels, const float* m,
                 int64_t frequency) {
    const int64_t height = min(kTile, a.h - place.y), width = min(kTile, a.w - place.x);
    const int64_t start = place.n * a.stride_n + place.y * a.stride_h + place.x * a.stride_w;
    for (int64_t i = 0; i < panels; ++i, oc += kPanel, m += kPanel) {
        Sums<kTile, 1> rows[kTile];
        transform_output<kTile>(m, frequency, rows);
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
            finish_row<kTile>(width, rows[y], e);
        }
    }
}

// The outputs of tiles [first, first + count) for the panels [panel, panel + panels) from their V.
template <int kTile, typename T>
void convolve_group(const Geometry<kTile>& g, int64_t first, int64_t count, int64_t panel, int64_t panels,
                    const float* v, float* m) {
    const Winograd& a = g.a;
    const int64_t frequencies = Geometry<kTile>::kFrequencies;
    const int64_t v_frequency = padded(count * g.channels), m_frequency = padded(count * panels * kPanel);
    const int64_t frequency = a.c * kPanel;
    for (int64_t f = 0; f < frequencies; ++f) {
        for (int64_t i = 0; i < panels; i += kMaxPanels) {
            Product p;
            p.v = v + f * v_frequency;
            p.weight = a.weight + ((panel + i) * frequencies + f) * frequency;
            p.m = m + f * m_frequency + i * kPanel;
            p.tiles = count;
            p.c = a.c;
            p.weight_panel = frequencies * frequency;
            p.v_tile = g.channels;
            p.m_tile = panels * kPanel;
            multiply_panels(min(kMaxPanels, panels - i), p);
        }
    }
    for (int64_t t = 0; t < count; ++t) {
        finish_tile<kTile, T>(a, place_of(g, first + t), panel * kPanel, panels, m + t * panels * kPanel,
                              m_frequency);
    }
}

template <int kTile, typename T>
void run(const Winograd& a) {
    const Geometry<kTile> g{a};
    if (g.tiles == 0) return;
    const Cut c = cut(g);
    const int64_t groups = divide_up(g.panels, kGroup);
    parallel_for(a.threads, c.blocks * c.groups, [&](int64_t task) {
        const int64_t block = task / c.groups, part = task % c.groups;
        const int64_t first = g.tiles * block / c.blocks, next = g.tiles * (block + 1) / c.blocks;
        const int64_t count = next - first, frequencies = Geometry<kTile>::kFrequencies;
        float* v = static_cast<float*>(thread_scratch(0, frequencies * padded(count * g.channels) * 4));
        const int64_t widest = min(g.panels, kGroup) * kPanel;
        float* m = static_cast<float*>(thread_scratch(1, frequencies * padded(count * widest) * 4));
        transform_input<kTile, T>(g, first, count, v);
        for (int64_t i = groups * part / c.groups; i < groups * (part + 1) / c.groups; ++i) {
            const int64_t panel = g.panels * i / groups, end = g.panels * (i + 1) / groups;
            convolve_group<kTile, T>(g, first, count, panel, end - panel, v, m);
        }
    });
}

template <typename T>
void run_tile_size(const Winograd& a) {
    if (a.tile == 4) {
        run<4, T>(a);
    } else {
        run<2, T>(a);
    }
}

}  // namespace

void winograd(const Winograd& args) {
    if (args.dtype == DType::f32) {
        run_tile_size<float>(args);
    } else {
        run_tile_size<bf16>(args);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
