// Direct convolution on packed strips, the core of conv_bn_act and stem.
//
// A strip of input rows is copied once into thread scratch with its zero borders, as words of one float32,
// two bfloat16 or four uint8 values (product.h), one chunk of channels at a time: [chunk][row][column][word].
// There the kernel_w taps of one kernel row are kernel_w * chunk consecutive words, so a convolution is
// kernel_h dot products of such runs for every pixel, and an output tile is a small matrix product: pixels x
// panels of 16 channels, kept in registers. Sums pass from chunk to chunk through scratch, so that one chunk
// of weights stays in cache while the strip's pixels stream by.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "partial.h"
#include "product.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

constexpr int kPanel = 16;  // output channels in a weight panel
constexpr int kPanelVectors = kPanel / kLanes;

// Shape of a register tile, pixels x panels. Each step of its product loads `panels` vectors of weights and
// one number per pixel; a core that loads as many vectors per cycle as it multiplies stalls unless loads are
// far fewer than products, so tiles are near square. The sums leave registers for the weights and one
// broadcast: 12 of 16 registers, 24 of 32. Measured with AVX-512, one thread, in GFLOP/s: 24 x 1 86, 12 x 2
// 135, 8 x 3 176, 6 x 4 176.
#if defined(__AVX512F__)
constexpr int kMaxPanels = 4;
constexpr int tile_pixels(int panels) { return panels == 4 ? 6 : panels == 3 ? 8 : 12; }
#else
constexpr int kMaxPanels = 1;
constexpr int tile_pixels(int) { return 12 / kPanelVectors; }
#endif

// One chunk of a strip, and the location of its sums.
template <typename P>
struct TileOf {
    const typename P::Word* input;   // first pixel, first tap
    int64_t input_row;               // words between kernel rows
    int64_t input_pixel;             // words between neighbouring output pixels
    const typename P::Word* weight;  // per panel kernel_h x run x 16
    int64_t weight_panel;            // words between panels
    int64_t kernel_h, run;
    typename P::Scalar* sums;         // pixels x panels x 16, carried between chunks
    const typename P::Scalar* start;  // panels x 16, initial value of the sums; null: zeros
    bool first, last;                 // chunk
    bool ahead;                       // whether the pixels after it are to be prefetched
};

template <int kPixels, int kPanels, typename Sum = vf>
struct Sums {
    Sum v[kPixels][kPanels * kPanelVectors];
};

// The products of a tile. With kAhead each step prefetches a part of the next pixels.
template <bool kAhead, typename P, int kPixels, int kPanels>
static inline __attribute__((always_inline)) void accumulate(const TileOf<P>& tile,
                                                             Sums<kPixels, kPanels, typename P::Sum>& out) {
    constexpr int kVectors = kPanels * kPanelVectors;
    Sums<kPixels, kPanels, typename P::Sum> sums;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const typename P::Sum start = tile.start ? load(tile.start + v * kLanes) : typename P::Sum{};
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) sums.v[p][v] = start;
    }
    const typename P::Word* weight = tile.weight;
    const int64_t pixel = tile.input_pixel;
    const typename P::Word* ahead = tile.input + kPixels * pixel;
    for (int64_t r = 0; r < tile.kernel_h; ++r) {
        const typename P::Word* input = tile.input + r * tile.input_row;
        for (int64_t k = 0; k < tile.run; ++k, ++input, weight += kPanel, ahead += kPixels) {
            if (kAhead) __builtin_prefetch(ahead);
            typename P::Weights w[kVectors];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                w[v] = load(weight + v / kPanelVectors * tile.weight_panel + v % kPanelVectors * kLanes);
            }
#pragma GCC unroll 32
            for (int p = 0; p < kPixels; ++p) {
                const typename P::Word x = input[p * pixel];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) sums.v[p][v] = P::add(sums.v[p][v], x, w[v]);
            }
        }
    }
    out = sums;
}

// Adds the sums of the previous chunks. Each chunk is summed from zero: one running sum of thousands of
// products would have several times the rounding error of blocked sums.
template <typename P, int kPixels, int kPanels>
static inline void add_carried(const TileOf<P>& tile, Sums<kPixels, kPanels, typename P::Sum>& sums) {
    constexpr int kVectors = kPanels * kPanelVectors;
    for (int p = 0; p < kPixels; ++p) {
        for (int v = 0; v < kVectors; ++v) sums.v[p][v] += load(tile.sums + (p * kVectors + v) * kLanes);
    }
}

template <typename P, int kPixels, int kPanels>
static inline void spill(const TileOf<P>& tile, const Sums<kPixels, kPanels, typename P::Sum>& sums) {
    constexpr int kVectors = kPanels * kPanelVectors;
    for (int p = 0; p < kPixels; ++p) {
        for (int v = 0; v < kVectors; ++v) store(tile.sums + (p * kVectors + v) * kLanes, sums.v[p][v]);
    }
}

template <typename T>
static inline T* moved(T* p, int64_t elements) {
    return p ? p + elements : nullptr;
}

// The epilogue of a tile: scale, shift, residual, activation and skip, for `channels` output channels. From
// uint8, to uint8 or to float32:
// act(scale * sum + shift + residual_scale * residual) + skip_scale * skip + bias.
template <typename T>
struct Epilogue {
    const float *scale, *shift;  // or null; for uint8 in whole panels
    const T *residual, *skip;    // at the first pixel, or null
    T* out;
    int64_t row, pixel;  // elements between rows and pixels in out, residual and skip
    int channels;
    float slope;
    // For uint8 only.
    float* floats;  // output where out is null
    float residual_scale, skip_scale, bias;

    Epilogue of_channels(int64_t first, int64_t count) const {
        Epilogue e = at(first);
        e.scale = moved(scale, first);
        e.shift = moved(shift, first);
        e.channels = static_cast<int>(count);
        return e;
    }
    Epilogue at(int64_t elements) const {
        Epilogue e = *this;
        e.residual = moved(residual, elements);
        e.skip = moved(skip, elements);
        e.out = moved(out, elements);
        e.floats = moved(floats, elements);
        return e;
    }
};

// For a Conv or a Winograd: all channels of whole images.
template <typename T, typename Args>
static Epilogue<T> epilogue_of(const Args& a) {
    Epilogue<T> e{};
    e.scale = a.scale;
    e.shift = a.shift;
    e.residual = static_cast<const T*>(a.residual);
    e.skip = static_cast<const T*>(a.skip);
    e.out = static_cast<T*>(a.out);
    e.row = a.stride_h;
    e.pixel = a.stride_w;
    e.slope = a.slope;
    e.residual_scale = a.residual_scale;
    e.skip_scale = a.skip_scale;
    e.bias = a.bias;
    return e;
}

static inline vf as_floats(vi sum) { return __builtin_convertvector(sum, vf); }
static inline vf as_floats(vf sum) { return sum; }
static inline const int32_t* scalars(const vi* sums) { return reinterpret_cast<const int32_t*>(sums); }
static inline const float* scalars(const vf* sums) { return reinterpret_cast<const float*>(sums); }

// Finishes `count` channels of one pixel at `at`, from scaled and shifted values.
template <typename T>
static inline __attribute__((always_inline)) void finish_channels(vf y, int64_t at, int count,
                                                                  const Epilogue<T>& e) {
    if (e.residual) y += load_up_to(e.residual + at, count);
    y = activate(y, e.slope);
    if (e.skip) y += load_up_to(e.skip + at, count);
    store_up_to(e.out + at, y, count);
}

// Whether saturation alone implements the activation of uint8.
static inline bool saturates(const Epilogue<uint8_t>& e) {
    return e.out && e.slope == 0 && e.bias == 0 && !e.skip;
}

static inline __attribute__((always_inline)) void finish_codes(vf y, int64_t at, int count, bool saturates,
                                                               const Epilogue<uint8_t>& e) {
    if (e.residual) y += load_up_to(e.residual + at, count) * splat(e.residual_scale);
    if (saturates) return store_up_to(e.out + at, y, count);
    const vf low = y * splat(e.slope);  // slopes are from 0 to 1
    y = y > low ? y : low;
    y += e.skip ? load_up_to(e.skip + at, count) * splat(e.skip_scale) + splat(e.bias) : splat(e.bias);
    if (e.out) {
        store_up_to(e.out + at, y, count);
    } else {
        store_up_to(e.floats + at, y, count);
    }
}

static inline __attribute__((always_inline)) void finish_channels(vf y, int64_t at, int count,
                                                                  const Epilogue<uint8_t>& e) {
    finish_codes(y, at, count, saturates(e), e);
}

// Calls body(finish) for the most common epilogues, where finish(y, at) does what finish_channels does for a
// whole vector, without its branches. Returns false for others.
template <typename T, typename Body>
static inline __attribute__((always_inline)) bool with_finish(const Epilogue<T>& e, const Body& body) {
    if (e.skip || (e.residual && e.slope != 0)) return false;
    if (e.residual) {
        body([&](vf y, int64_t at) { store(e.out + at, activate(y + load(e.residual + at), 0)); });
    } else if (e.slope == 0) {
        body([&](vf y, int64_t at) { store(e.out + at, activate(y, 0)); });
    } else {
        const vf slope = splat(e.slope);
        body([&](vf y, int64_t at) { store(e.out + at, vf{} > y ? y * slope : y); });
    }
    return true;
}

template <typename Body>
static inline __attribute__((always_inline)) bool with_finish(const Epilogue<uint8_t>& e, const Body& body) {
    if (!e.out) return false;
    const bool saturated = saturates(e);
    const vf scale = splat(e.residual_scale);
    if (saturated && e.residual) {
        body([&](vf y, int64_t at) { store(e.out + at, y + load(e.residual + at) * scale); });
    } else if (saturated) {
        body([&](vf y, int64_t at) { store(e.out + at, y); });
    } else {
        body([&](vf y, int64_t at) { finish_codes(y, at, kLanes, false, e); });
    }
    return true;
}

// The epilogue of sums [pixel][vector], for any tile: compiled once, not for each tile shape.
template <typename Scalar, typename T>
static __attribute__((noinline)) void finish_sums(const Scalar* sums, int pixels, int vectors,
                                                  const Epilogue<T>& e) {
    for (int v = 0; v < vectors; ++v) {
        const int first = v * kLanes;
        const int count = e.channels - first < kLanes ? e.channels - first : kLanes;
        if (count <= 0) break;
        const vf scale = e.scale ? load_up_to(e.scale + first, count) : splat(1);
        const vf shift = e.shift ? load_up_to(e.shift + first, count) : vf{};
        for (int p = 0; p < pixels; ++p) {
            const vf sum = as_floats(load(sums + (p * vectors + v) * kLanes));
            finish_channels(sum * scale + shift, p * e.pixel + first, count, e);
        }
    }
}

// As above, in registers: finish(y, at) takes the scaled and shifted sums of each vector.
template <int kPixels, int kPanels, typename Sum, typename T, typename Finish>
static inline __attribute__((always_inline)) void finish_in_registers(const Sums<kPixels, kPanels, Sum>& sums,
                                                                      const Epilogue<T>& e,
                                                                      const Finish& finish) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * kPanelVectors; ++v) {
        const int first = v * kLanes;
        const vf scale = load(e.scale + first), shift = load(e.shift + first);
#pragma GCC unroll 32
        for (int p = 0; p < kPixels; ++p) {
            finish(as_floats((Sum)sums.v[p][v]) * scale + shift, p * e.pixel + first);
        }
    }
}

// Whether a tile is among the largest, into which most rows are cut: what makes code for each shape of tile
// is done for these alone.
constexpr bool is_common(int pixels, int panels) { return panels > 2 && pixels + 1 >= tile_pixels(panels); }

// With few input channels per pixel, storing and reloading the sums would take half as long as their
// products: common tiles are finished in registers, in int8 all wide ones. Otherwise 64 channels to 256 in
// bfloat16 take an eighth longer.
template <int kPixels, int kPanels, typename Sum, typename T>
static inline void finish(const Sums<kPixels, kPanels, Sum>& sums, const Epilogue<T>& e) {
    constexpr bool kCommon = is_common(kPixels, kPanels);
    if ((std::is_same<T, uint8_t>::value ? kPanels > 2 : kCommon) && e.channels == kPanels * kPanel &&
        e.scale && e.shift) {
        const auto whole = [&](const auto& finish) { finish_in_registers(sums, e, finish); };
        if (with_finish(e, whole)) return;
    }
    finish_sums(scalars(sums.v[0]), kPixels, kPanels * kPanelVectors, e);
}

// Prefetches a tile of the residual, or of the output to be written, while the tile is multiplied: its pixels
// are too far apart for the hardware prefetcher. Inlined by force: GCC 12 takes a function that only
// prefetches for one without effect, and drops its calls.
template <int kPixels, bool kWrite, typename T>
static inline __attribute__((always_inline)) void fetch(const T* tile, const Epilogue<T>& e) {
    if (!tile) return;
    for (int p = 0; p < kPixels; ++p) {
        const T* pixel = tile + p * e.pixel;
        for (int k = 0; k < e.channels; k += 64 / static_cast<int>(sizeof(T))) {
            __builtin_prefetch(pixel + k, kWrite);
        }
    }
}

// Whether a tile prefetches the next pixels, and the lines that it will write. ShelfNet50's 1x1 convolutions
// at 128 x 128 take 9 to 20 % less time in float32 and 8 to 23 % in bfloat16 with these and finishing in
// registers; in int8, whose activations stay in cache, a network would take 1 to 2 % longer.
template <typename P>
constexpr bool kFetches = P::kElements < 4;

template <int kPixels, int kPanels, typename P, typename E>
static void run_tile(const TileOf<P>& tile, const E& epilogue) {
    Sums<kPixels, kPanels, typename P::Sum> sums;
    if (tile.last) {
        fetch<kPixels, false>(epilogue.residual, epilogue);
        if (kFetches<P>) fetch<kPixels, true>(epilogue.out, epilogue);
    }
    if (kFetches<P> && is_common(kPixels, kPanels) && tile.ahead) {
        accumulate<true>(tile, sums);
    } else {
        accumulate<false>(tile, sums);
    }
    if (!tile.first) add_carried(tile, sums);
    if (tile.last) {
        finish(sums, epilogue);
    } else {
        spill(tile, sums);
    }
}

// Calls run_tile<pixels, kPanels> for a count of pixels known at run time.
template <int kPanels, typename P, typename E, int kPixels = tile_pixels(kPanels)>
static inline void run_tile_of(int pixels, const TileOf<P>& tile, const E& epilogue) {
    if constexpr (kPixels > 0) {
        if (pixels == kPixels) return run_tile<kPixels, kPanels>(tile, epilogue);
        run_tile_of<kPanels, P, E, kPixels - 1>(pixels, tile, epilogue);
    }
}

// A convolution's geometry; `c` and `chunk` are words of a pixel.
struct Shape {
    int64_t c, chunk, kernel_h, kernel_w, stride, out_w, out_c;

    int64_t chunks() const { return (c + chunk - 1) / chunk; }
    int64_t chunk_width(int64_t i) const { return i + 1 < chunks() ? chunk : c - i * chunk; }
    int64_t panel_words() const { return kernel_h * kernel_w * c * kPanel; }
    int64_t columns() const { return (out_w - 1) * stride + kernel_w; }
    int64_t input_rows(int64_t out_rows) const { return (out_rows - 1) * stride + kernel_h; }
};

// A packed strip, or with strides an input used in place, with the chunks of each pixel adjacent.
template <typename P>
struct Input {
    const typename P::Word* data;
    // Words between input rows, and between adjacent output pixels; 0 for a packed strip, where they follow
    // from the chunk's width.
    int64_t row, pixel;
    const typename P::Scalar* start;  // per output channel, initial value of the sums; or null
};

// One chunk of `out_rows` output rows, for kPanels panels from output channel `oc`; `o` is the strip's
// epilogue.
template <int kPanels, typename P, typename E>
static void convolve_chunk(const Shape& s, TileOf<P> tile, int64_t out_rows, int64_t oc,
                           typename P::Scalar* sums, const E& o) {
    const typename P::Word* chunk = tile.input;
    const int64_t tiles = (s.out_w + tile_pixels(kPanels) - 1) / tile_pixels(kPanels);
    const E of_panels = o.of_channels(oc, s.out_c - oc < kPanels * kPanel ? s.out_c - oc : kPanels * kPanel);
    for (int64_t y = 0; y < out_rows; ++y) {
        for (int64_t t = 0; t < tiles; ++t) {
            // Tiles of nearly equal size: a narrow last one would leave most registers unused.
            const int64_t x = t * s.out_w / tiles, next = (t + 1) * s.out_w / tiles;
            tile.input = chunk + y * s.stride * tile.input_row + x * tile.input_pixel;
            tile.sums = sums + (y * s.out_w + x) * kPanels * kPanel;
            run_tile_of<kPanels>(static_cast<int>(next - x), tile, of_panels.at(y * o.row + x * o.pixel));
        }
    }
}

// Calls convolve_chunk<panels> for a count of panels known at run time.
template <typename P, typename E, int kPanels = kMaxPanels>
static inline void convolve_chunk_of(int64_t panels, const Shape& s, const TileOf<P>& tile, int64_t out_rows,
                                     int64_t oc, typename P::Scalar* sums, const E& o) {
    if constexpr (kPanels > 0) {
        if (panels == kPanels) return convolve_chunk<kPanels>(s, tile, out_rows, oc, sums, o);
        convolve_chunk_of<P, E, kPanels - 1>(panels, s, tile, out_rows, oc, sums, o);
    }
}

// All pixels of `out_rows` output rows, for `panels` weight panels, at most kMaxPanels, from `first`.
template <typename P, typename E>
static void convolve_panels(const Shape& s, const Input<P>& input, int64_t out_rows, int64_t first,
                            int64_t panels, const typename P::Word* weight, typename P::Scalar* sums,
                            const E& o) {
    const int64_t columns = s.columns(), rows = s.input_rows(out_rows);
    TileOf<P> tile;
    tile.weight_panel = s.panel_words();
    tile.weight = weight + first * tile.weight_panel;
    tile.kernel_h = s.kernel_h;
    const typename P::Word* chunk = input.data;
    for (int64_t i = 0; i < s.chunks(); ++i) {
        const int64_t width = s.chunk_width(i);
        tile.input = chunk;
        tile.input_row = input.row ? input.row : columns * width;
        tile.input_pixel = input.pixel ? input.pixel : s.stride * width;
        tile.run = s.kernel_w * width;
        tile.first = i == 0;
        tile.start = tile.first ? moved(input.start, first * kPanel) : nullptr;
        tile.last = i + 1 == s.chunks();
        tile.ahead = input.pixel && tile.input_pixel == width;
        convolve_chunk_of<P>(panels, s, tile, out_rows, first * kPanel, sums, o);
        tile.weight += tile.kernel_h * tile.run * kPanel;
        chunk += input.pixel ? width : rows * columns * width;
    }
}

// As above, for the weight panels [begin, end), in groups of nearly equal size.
template <typename P, typename E>
static void convolve_strip(const Shape& s, const Input<P>& input, int64_t out_rows, int64_t begin,
                           int64_t end, const typename P::Word* weight, typename P::Scalar* sums,
                           const E& o) {
    const int64_t groups = (end - begin + kMaxPanels - 1) / kMaxPanels;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t first = begin + (end - begin) * g / groups,
                      next = begin + (end - begin) * (g + 1) / groups;
        convolve_panels(s, input, out_rows, first, next - first, weight, sums, o);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
