#include <algorithm>
#include <cmath>

#include "activation.cuh"
#include "primitives.cuh"
#include "stem.h"

// A block computes tiles of pooled pixels for 64 output channels: a patch of the normalised image, the
// convolution's output and its weights are in shared memory, and only pooled pixels leave.
//
// A tile is 7 x 8 pooled pixels, from 15 x 17 of the convolution: 255, one less than the 8 warps compute in
// two fragments of 16 each, and 14 % more than 4 per pooled pixel, since neighbouring tiles recompute the
// border. It needs 65 KB at 16 bits and 88 KB in float32, so two blocks share a multiprocessor: one loads or
// pools while the other convolves.
//
// The products of a filter row read 21 adjacent elements of a patch row, and the next pixel's begin 6
// elements further: the convolution is a matrix product whose left operand is read from the patch in place.

namespace shelfkern {
namespace cuda {
namespace {

constexpr int kThreads = 256, kChannels = 64;
constexpr int kFilterRows = 7, kFilterRow = 7 * 3;
constexpr int kPoolH = 7, kPoolW = 8, kPoolPixels = kPoolH * kPoolW;
constexpr int kConvH = 2 * kPoolH + 1, kConvW = 2 * kPoolW + 1, kConvPixels = kConvH * kConvW;
// Elements of a patch row. It begins one element before the first window: there bytes of the image can be
// loaded in groups of four, and pairs of 16-bit elements are aligned for every window.
constexpr int kPatchStep = 6, kPatchRow = kPatchStep * (kConvW - 1) + 24, kPatchRows = 2 * kConvH + 5;
constexpr int kLoad = 4;  // elements per load
// Tensor cores: a filter row is padded to three groups of eight, its weights to a multiple of sixteen, and
// then by 8 more so that the eight rows of an ldmatrix are in different banks.
constexpr int kEights = 3, kSteps = (kEights * kFilterRows + 1) / 2, kWeightRow = 16 * kSteps + 8;

template <typename T_, typename Pixel_>
struct Shape {
    using T = T_;
    using Pixel = Pixel_;  // uint8_t, or T
    static constexpr bool kRaw = std::is_same_v<Pixel, uint8_t>;
    static constexpr bool kFloat = std::is_same_v<T, float>;
    static constexpr int kPack = 16 / sizeof(T);
    // Features are kept for 128 bytes of channels at a time.
    static constexpr int kKept = 8 * kPack;
    static constexpr int kWeights = kFloat ? kFilterRows * kFilterRow * kChannels : kChannels * kWeightRow;
    static constexpr int kTable = kRaw ? 256 * 3 : 0, kPatch = kPatchRows * kPatchRow;
    // Byte offsets in shared memory.
    static constexpr int kTableAt = kWeights * sizeof(T), kPatchAt = kTableAt + kTable * sizeof(T);
    static constexpr int kFeaturesAt = kPatchAt + kPatch * sizeof(T);
    static constexpr int kSharedBytes = kFeaturesAt + kConvPixels * 128;
};

template <typename S>
struct Args {
    Global<const typename S::Pixel> image;
    int64_t image_n, image_c, image_h, image_w;  // strides
    int height, width;                           // size of the image
    bool words;                                  // whether the image can be read four bytes at a time
    Weights<float> values;
    Weights<typename S::T> weight;
    Weights<float> scale, shift;
    View<typename S::T> out;
    int h, w, c;  // size of out
    bool packs;   // whether out can be written 16 bytes at a time
    unsigned tiles_y, tiles_x, tiles;
    float slope;
};

struct Tile {
    int image;
    int y, x;  // of the first pooled pixel
};

template <typename S>
DEVICE Tile tile_of(const Args<S>& args, unsigned index) {
    const unsigned row = index / args.tiles_x;
    return {static_cast<int>(row / args.tiles_y), static_cast<int>(row % args.tiles_y) * kPoolH,
            static_cast<int>(index % args.tiles_x) * kPoolW};
}

DEVICE int first_channel() { return block_index_y() * kChannels; }

// Loads the group's weights and the table of normalised byte values.
template <typename S>
DEVICE void load_parameters(const Args<S>& args, Shared<typename S::T> weight, Shared<typename S::T> table) {
    const int64_t from = int64_t{block_index_y()} * S::kWeights;
    for (int i = thread_index() * S::kPack; i < S::kWeights; i += kThreads * S::kPack) {
        cp_async_16(weight + i, args.weight + (from + i), true);
    }
    cp_async_commit();
    for (int i = thread_index(); i < S::kTable; i += kThreads) {
        table.store(i, narrow<typename S::T>(args.values.load(i)));
    }
}

// A thread loads the same four elements of every kLoadRows-th row of the patch. A patch row begins with
// channel 2 of the image's column 4 * tile.x - 6.
constexpr int kLoaders = kPatchRow / kLoad, kLoadRows = kThreads / kLoaders;
constexpr int kLoadsAhead = (kPatchRows + kLoadRows - 1) / kLoadRows;

struct Loader {
    int row, first;

    DEVICE int channel(int k) const { return (first + k + 2) % 3; }
    DEVICE int column(int k) const { return (first + k + 2) / 3; }  // relative to that column
};

// The thread's loader. It hides from the compiler that it is the same for every tile: values derived from it
// would occupy registers that the convolution needs.
DEVICE Loader loader() {
    const int thread = opaque(thread_index());
    return {thread / kLoaders, thread % kLoaders * kLoad};
}

// Loads the normalised image around a tile, with zeros outside the image.
template <typename S>
DEVICE void load_patch(const Args<S>& args, const Tile& tile, Shared<typename S::T> table,
                       Shared<typename S::T> patch) {
    const Loader me = loader();
    if (me.row >= kLoadRows) return;
#pragma unroll 1
    for (int row = me.row; row < kPatchRows; row += kLoadRows) {
        const int y = 4 * tile.y - 5 + row;
        Pack<typename S::T, kLoad> values{};
        for (int k = 0; k < kLoad; ++k) {
            const int x = 4 * tile.x - 6 + me.column(k);
            if (y < 0 || y >= args.height || x < 0 || x >= args.width) continue;
            const auto value = args.image.load(tile.image * args.image_n + y * args.image_h +
                                               x * args.image_w + me.channel(k) * args.image_c);
            if constexpr (S::kRaw) {
                values[k] = table.load(value * 3 + me.channel(k));
            } else {
                values[k] = value;
            }
        }
        patch.store_pack(row * kPatchRow + me.first, values);
    }
}

// As above from rows of bytes, four at a time, which are all inside or all outside. All loads of a thread are
// in flight at once.
template <typename S>
DEVICE void load_patch_words(const Args<S>& args, const Tile& tile, Shared<typename S::T> table,
                             Shared<typename S::T> patch) {
    const Loader me = loader();
    if (me.row >= kLoadRows) return;
    const int y = 4 * tile.y - 5 + me.row, at = 12 * tile.x - 16 + me.first;  // at: from a row's first byte
    int64_t from = tile.image * args.image_n + y * args.image_h + at;
    Pack<uint8_t, kLoad> words[kLoadsAhead];
    bool in[kLoadsAhead];
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i, from += kLoadRows * args.image_h) {
        const int down = i * kLoadRows;
        in[i] = me.row + down < kPatchRows && y + down >= 0 && y + down < args.height && at >= 0 &&
                at < 3 * args.width;
        if (in[i]) words[i] = args.image.template load_pack<kLoad>(from);
    }
#pragma unroll
    for (int i = 0; i < kLoadsAhead; ++i) {
        const int row = me.row + i * kLoadRows;
        if (row >= kPatchRows) continue;
        Pack<typename S::T, kLoad> values{};
        if (in[i]) {
            for (int k = 0; k < kLoad; ++k) values[k] = table.load(words[i][k] * 3 + me.channel(k));
        }
        patch.store_pack(row * kPatchRow + me.first, values);
    }
}

// Index of the element before those of a convolution pixel's first filter row.
DEVICE int patch_at(int pixel) { return pixel / kConvW * 2 * kPatchRow + pixel % kConvW * kPatchStep; }

// Position of 16 bytes of a pixel's features: adjacent pixels permute them differently, so that a fragment of
// eight is written to all banks.
template <typename S>
DEVICE int feature_at(int pixel, int pack) {
    return pixel * S::kKept + (pack ^ (pixel & 7)) * S::kPack;
}

// scale * sum + shift after the activation; minus infinity above and to the left of the convolution's output,
// the padding of the pooling.
template <typename S>
DEVICE float feature(const Args<S>& args, const Tile& tile, int pixel, float scale, float sum, float shift) {
    const bool padding = (tile.y == 0 && pixel < kConvW) || (tile.x == 0 && pixel % kConvW == 0);
    return padding ? -INFINITY : activate(fmaf(scale, sum, shift), args.slope);
}

// Tensor cores. A warp computes kFragments x 16 pixels of all channels.
constexpr int kFragments = 2, kColumns = kChannels / 8;

DEVICE int first_pixel(int fragment) { return (warp() * kFragments + fragment) * 16 + lane() / 4; }

// Two adjacent elements of each of 8 pixels, from group `eight` of their filter rows. A filter row's padding
// contains another pixel's values, which may not be finite: weights of zero alone would not remove them.
template <typename T>
DEVICE uint32_t load_a(Shared<T> patch, int pixel_at, int eight) {
    if (eight >= kEights * kFilterRows) return 0;
    const int part = eight % kEights, t = lane() % 4;
    const Pack<T, 2> pair =
        patch.template load_pack<2>(pixel_at + eight / kEights * kPatchRow + part * 8 + 2 * t);
    const uint32_t both = static_cast<uint32_t>(pair[1].bits) << 16 | pair[0].bits;
    if (part == 0 && t == 0) return both & 0xffff0000;
    if (part == kEights - 1 && t == 3) return 0;
    return both;
}

template <typename T>
DEVICE void load_b(Shared<T> weight, int step, uint32_t (&b)[kColumns][2]) {
#pragma unroll
    for (int j = 0; j < kColumns; j += 2) {
        const int row = 8 * j + lane() / 16 * 8 + lane() % 8;
        uint32_t r[4];
        ldmatrix_x4(r, weight + (row * kWeightRow + step * 16 + lane() / 8 % 2 * 8));
        b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
}

template <typename T>
DEVICE void convolve(Shared<T> patch, Shared<T> weight, float (&sums)[kFragments][kColumns][4]) {
    int at[kFragments][2];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
        for (int half = 0; half < 2; ++half) {
            at[i][half] = patch_at(min(first_pixel(i) + 8 * half, kConvPixels - 1));
        }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
        uint32_t b[kColumns][2];
        load_b(weight, step, b);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
            const uint32_t a[4] = {load_a(patch, at[i][0], 2 * step), load_a(patch, at[i][1], 2 * step),
                                   load_a(patch, at[i][0], 2 * step + 1),
                                   load_a(patch, at[i][1], 2 * step + 1)};
#pragma unroll
            for (int j = 0; j < kColumns; ++j) mma_m16n8k16<T>(sums[i][j], a, b[j]);
        }
    }
}

template <typename S>
DEVICE void store_features(const Args<S>& args, const Tile& tile,
                           const float (&sums)[kFragments][kColumns][4], Shared<typename S::T> features) {
    using T = typename S::T;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
        const int pair = lane() % 4 * 2, channel = first_channel() + 8 * j + pair;
        const Pack<float, 2> m = args.scale.template load_pack<2>(channel);
        const Pack<float, 2> b = args.shift.template load_pack<2>(channel);
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int pixel = first_pixel(i) + 8 * half;
                if (pixel >= kConvPixels) continue;
                const float* sum = sums[i][j] + 2 * half;
                const Pack<T, 2> values{narrow<T>(feature(args, tile, pixel, m[0], sum[0], b[0])),
                                        narrow<T>(feature(args, tile, pixel, m[1], sum[1], b[1]))};
                features.store_pack(feature_at<S>(pixel, j) + pair, values);
            }
        }
    }
}

// float32. A thread computes kPerThread pixels, 32 apart, for 4 adjacent channels in each half of the 64: the
// lanes of a load read adjacent banks, or one address.
constexpr int kPerThread = 8, kPixelStep = kThreads / 8;

DEVICE void convolve(Shared<float> patch, Shared<float> weight, float (&sums)[2][kPerThread][4]) {
    int at[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        at[i] = 1 + patch_at(min(thread_index() / 8 + i * kPixelStep, kConvPixels - 1));
    }
#pragma unroll 1
    for (int r = 0; r < kFilterRows; ++r) {
#pragma unroll 1  // unrolled by two it needs more registers than two blocks have
        for (int k = 0; k < kFilterRow; ++k) {
            const int tap = (r * kFilterRow + k) * kChannels + thread_index() % 8 * 4;
            const Pack<float, 4> b[2] = {weight.load_pack<4>(tap), weight.load_pack<4>(tap + kChannels / 2)};
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                const float a = patch.load(at[i] + r * kPatchRow + k);
                for (int half = 0; half < 2; ++half) {
                    for (int c = 0; c < 4; ++c) sums[half][i][c] = fmaf(a, b[half][c], sums[half][i][c]);
                }
            }
        }
    }
}

template <typename S>
DEVICE void store_features(const Args<S>& args, const Tile& tile, int half,
                           const float (&sums)[kPerThread][4], Shared<float> features) {
    const int pack = thread_index() % 8, channel = first_channel() + half * S::kKept + 4 * pack;
    const Pack<float, 4> m = args.scale.template load_pack<4>(channel);
    const Pack<float, 4> b = args.shift.template load_pack<4>(channel);
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const int pixel = thread_index() / 8 + i * kPixelStep;
        if (pixel >= kConvPixels) continue;
        Pack<float, 4> values;
        for (int c = 0; c < 4; ++c) values[c] = feature(args, tile, pixel, m[c], sums[i][c], b[c]);
        features.store_pack(feature_at<S>(pixel, pack), values);
    }
}

DEVICE void keep_larger(Pack<float, 4>& best, const Pack<float, 4>& values) {
    for (int i = 0; i < 4; ++i) best[i] = larger(best[i], values[i]);
}

template <typename T>
DEVICE void keep_larger(Pack<T, 8>& best, const Pack<T, 8>& values) {
    uint32_t a[4], b[4];
    memcpy(a, &best, 16);
    memcpy(b, &values, 16);
    for (int i = 0; i < 4; ++i) a[i] = larger2<T>(a[i], b[i]);
    memcpy(&best, a, 16);
}

// Pools the tile, for the kept channels from `channel` on.
template <typename S>
DEVICE void pool(const Args<S>& args, const Tile& tile, int channel, Shared<typename S::T> features) {
    using Values = Pack<typename S::T, S::kPack>;
#pragma unroll 1
    for (int i = thread_index(); i < kPoolPixels * 8; i += kThreads) {
        const int pack = i % 8, py = i / 8 / kPoolW, px = i / 8 % kPoolW;
        const int first = channel + pack * S::kPack, y = tile.y + py, x = tile.x + px;
        if (y >= args.h || x >= args.w || first >= args.c) continue;
        const int corner = 2 * py * kConvW + 2 * px;
        Values best = features.template load_pack<S::kPack>(feature_at<S>(corner, pack));
#pragma unroll
        for (int k = 1; k < 9; ++k) {
            const int pixel = corner + k / 3 * kConvW + k % 3;
            keep_larger(best, features.template load_pack<S::kPack>(feature_at<S>(pixel, pack)));
        }
        const int64_t to = args.out.offset(tile.image, y, x) + first;
        if (args.packs) {
            args.out.data.store_pack(to, best);
        } else {
            for (int k = 0; k < S::kPack && first + k < args.c; ++k) args.out.data.store(to + k, best[k]);
        }
    }
}

template <typename S>
KERNEL(kThreads, 2)
stem_kernel(const Args<S> args) {
    using T = typename S::T;
    const Shared<T> weight = shared<T>(0, S::kWeights), table = shared<T>(S::kTableAt, S::kTable);
    const Shared<T> patch = shared<T>(S::kPatchAt, S::kPatch);
    const Shared<T> features = shared<T>(S::kFeaturesAt, kConvPixels * S::kKept);
    load_parameters(args, weight, table);
    release_next();
    wait_for_previous();
    cp_async_wait<0>();
    barrier();

    for (unsigned index = block_index_x(); index < args.tiles; index += block_count_x()) {
        const Tile tile = tile_of(args, index);
        if (args.words) {
            if constexpr (S::kRaw) load_patch_words(args, tile, table, patch);
        } else {
            load_patch(args, tile, table, patch);
        }
        barrier();
        if constexpr (S::kFloat) {
            float sums[2][kPerThread][4] = {};
            convolve(patch, weight, sums);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (half > 0) barrier();
                store_features(args, tile, half, sums[half], features);
                barrier();
                pool(args, tile, first_channel() + half * S::kKept, features);
            }
        } else {
            float sums[kFragments][kColumns][4] = {};
            convolve(patch, weight, sums);
            store_features(args, tile, sums, features);
            barrier();
            pool(args, tile, first_channel(), features);
        }
    }
}

template <typename S>
void launch_shape(const Stem& op, Stream stream) {
    using T = typename S::T;
    const Image& image = op.image;
    const Nhwc& out = op.out;
    const int64_t groups = ceil_div(out.c, kChannels);
    const int64_t tiles_y = ceil_div(out.h, kPoolH), tiles_x = ceil_div(out.w, kPoolW);
    const int64_t tiles = out.n * tiles_y * tiles_x;
    if (tiles > 0x7fffffff) {
        throw std::runtime_error("stem: out has " + std::to_string(tiles) +
                                 " tiles of 7 x 8 pixels, it may have 2147483647");
    }
    Args<S> args{};
    args.image = global(static_cast<const typename S::Pixel*>(image.data), image.extent());
    args.image_n = image.stride_n, args.image_c = image.stride_c;
    args.image_h = image.stride_h, args.image_w = image.stride_w;
    args.height = static_cast<int>(image.h), args.width = static_cast<int>(image.w);
    args.words = image.has_words();
    args.values = weights(op.values, 256 * 3);
    args.weight = weights(static_cast<const T*>(op.weight), groups * S::kWeights);
    args.scale = weights(op.scale, groups * kChannels);
    args.shift = weights(op.shift, groups * kChannels);
    args.out = view<T>(out);
    args.h = static_cast<int>(out.h), args.w = static_cast<int>(out.w), args.c = static_cast<int>(out.c);
    args.packs = out.has_packs(S::kPack, sizeof(T));
    args.tiles_y = static_cast<unsigned>(tiles_y), args.tiles_x = static_cast<unsigned>(tiles_x);
    args.tiles = static_cast<unsigned>(tiles);
    args.slope = op.slope;
    launch(stem_kernel<S>, {"stem", kThreads, S::kSharedBytes, stream}, {std::min(tiles, op.blocks), groups},
           args);
}

template <typename T>
void launch_type(const Stem& op, Stream stream) {
    if (op.image.dtype == DType::u8) {
        launch_shape<Shape<T, uint8_t>>(op, stream);
    } else if (op.image.dtype == op.dtype) {
        launch_shape<Shape<T, T>>(op, stream);
    } else {
        throw std::runtime_error("stem: the image's dtype is neither uint8 nor out's");
    }
}

}  // namespace

void stem(const Stem& op, Stream stream) {
    with_type("stem", op.dtype, [&](auto type) { launch_type<decltype(type)>(op, stream); });
}

}  // namespace cuda
}  // namespace shelfkern
