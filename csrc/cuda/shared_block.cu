#include <algorithm>

#include "activation.cuh"
#include "primitives.cuh"
#include "shared_block.h"

// A block computes a tile of output pixels. It loads x with a border of two pixels and computes h with a
// border of one; both stay in shared memory: h never reaches global memory. Neighbouring tiles recompute the
// border of h, which is 16 % more arithmetic for 12 rows and 20 % for 8.
//
// 64 channels: the weights stay in shared memory for all tiles of a block and for both convolutions.
// 128 channels: they do not fit, and stream through three buffers, 64 input channels of one tap at a time.

namespace shelfkern {
namespace cuda {
namespace {

constexpr int kThreads = 256, kTaps = 9, kOutW = 16, kHiddenW = kOutW + 2, kInputW = kOutW + 4;
constexpr int kPack = 8;        // elements per 16 bytes
constexpr int kSlabDepth = 64;  // input channels per slab of weights
constexpr int kWarpsM = 4, kWarpsN = 2;

// kC: padded channels. kRows: rows of the output tile.
template <typename T_, int kC_, int kRows_>
struct Shape {
    using T = T_;
    static constexpr int kC = kC_, kRows = kRows_;
    static constexpr int kInputPixels = (kRows + 4) * kInputW, kHiddenPixels = (kRows + 2) * kHiddenW;
    static constexpr int kOutPixels = kRows * kOutW;
    static constexpr int kSlabs = kTaps * kC / kSlabDepth, kSlab = kC * kSlabDepth;
    static constexpr bool kResident = kC == 64;
    static constexpr int kBuffers = kResident ? kSlabs : 3;
    // Per warp: rows of 16 pixels, and columns of 8 output channels.
    static constexpr int kHiddenTiles = (kHiddenPixels + 16 * kWarpsM - 1) / (16 * kWarpsM);
    static constexpr int kOutTiles = (kOutPixels + 16 * kWarpsM - 1) / (16 * kWarpsM);
    static constexpr int kColumns = kC / 8 / kWarpsN;
    // Byte offsets in shared memory.
    static constexpr int kInputAt = kBuffers * kSlab * 2, kHiddenAt = kInputAt + kInputPixels * kC * 2;
    static constexpr int kSharedBytes = kHiddenAt + kHiddenPixels * kC * 2;
};

template <typename T>
struct Args {
    View<const T> x;
    Weights<T> weight;
    Weights<float> scale1, shift1, scale2, shift2;
    View<T> out;
    int h, w, c, tiles_y, tiles_x;
    int64_t tiles;
    float slope;
    bool skip;
};

struct Tile {
    int64_t image;
    int y, x;  // of the first output pixel
};

template <typename T>
DEVICE Tile tile_of(const Args<T>& args, int64_t index, int rows) {
    const int64_t row = index / args.tiles_x;
    return {row / args.tiles_y, static_cast<int>(row % args.tiles_y) * rows,
            static_cast<int>(index % args.tiles_x) * kOutW};
}

template <typename T>
DEVICE bool inside(const Args<T>& args, int y, int x) {
    return y >= 0 && y < args.h && x >= 0 && x < args.w;
}

// Position of a pack of channels. A pixel spans all banks once or twice, so eight pixels read together would
// conflict unless each permutes its packs differently: by exclusive or with a key that differs among them.
// `key` counts pixels in the reader's order.
template <int kC>
DEVICE int swizzled(int pixel, int pack, int key) {
    return pixel * kC + (pack ^ (key & 7)) * kPack;
}

DEVICE int input_key(int y, int x) { return y * kHiddenW + x; }
DEVICE int hidden_key(int, int x) { return x; }  // rows of 16 pixels are multiples of eight

// Loads a tile's input pixels: asynchronously in packs, or one channel at a time where packs do not fit.
template <typename S, bool kPacks>
DEVICE void load_input(const Args<typename S::T>& args, const Tile& tile, Shared<typename S::T> input) {
    using T = typename S::T;
    constexpr int kPerPixel = S::kC / kPack;
    for (int i = thread_index(); i < S::kInputPixels * kPerPixel; i += kThreads) {
        const int pixel = i / kPerPixel, pack = i % kPerPixel;
        const int ty = pixel / kInputW, tx = pixel % kInputW, y = tile.y + ty - 2, x = tile.x + tx - 2;
        const int to = swizzled<S::kC>(pixel, pack, input_key(ty, tx));
        const bool in = inside(args, y, x);
        const int64_t from = args.x.offset(tile.image, y, x) + pack * kPack;
        if constexpr (kPacks) {
            cp_async_16(input + to, args.x.data + from, in && pack * kPack < args.c);
        } else {
            Pack<T, kPack> values{};
            for (int k = 0; k < kPack; ++k) {
                if (in && pack * kPack + k < args.c) values[k] = args.x.data.load(from + k);
            }
            input.store_pack(to, values);
        }
    }
}

// Copies slab `slab` of the weights into buffer `buffer`, asynchronously.
template <typename S>
DEVICE void load_slab(const Args<typename S::T>& args, int slab, int buffer, Shared<typename S::T> weight) {
    constexpr int kPerRow = kSlabDepth / kPack;
    for (int i = thread_index(); i < S::kC * kPerRow; i += kThreads) {
        const int row = i / kPerRow, pack = i % kPerRow;
        cp_async_16(weight + buffer * S::kSlab + swizzled<kSlabDepth>(row, pack, row),
                    args.weight + (int64_t{slab} * S::kSlab + i * kPack), true);
    }
}

// Cycles through the slabs, twice per tile. `done` counts slabs used since the start.
template <typename S>
struct Slabs {
    Shared<typename S::T> weight;
    int64_t done, total;

    DEVICE void start(const Args<typename S::T>& args) {
        constexpr int kAhead = S::kResident ? S::kSlabs : S::kBuffers - 1;
        for (int slab = 0; slab < kAhead; ++slab) load_slab<S>(args, slab, slab, weight);
    }

    // The weights of the next slab. When any thread returns, all have finished with the previous one.
    DEVICE Shared<typename S::T> next(const Args<typename S::T>& args) {
        if constexpr (!S::kResident) {
            cp_async_wait<S::kBuffers - 2>();
            barrier();
            const int64_t ahead = done + S::kBuffers - 1;
            if (ahead < total) load_slab<S>(args, ahead % S::kSlabs, ahead % S::kBuffers, weight);
            cp_async_commit();
        }
        return weight + static_cast<int>(done++ % S::kBuffers) * S::kSlab;
    }
};

// A warp's accumulators: kTiles rows of 16 pixels by kColumns columns of 8 channels.
template <int kTiles, int kColumns>
struct Sums {
    float d[kTiles][kColumns][4];
};

DEVICE int first_row() { return warp() / kWarpsN * 16; }  // of a warp's first tile; the next are 64 apart

template <typename S>
DEVICE int first_column() {
    return warp() % kWarpsN * S::kColumns * 8;
}

// Fragment B for 16 input channels and the warp's output channels: rows of weights are columns of B.
template <typename S>
DEVICE void load_b(Shared<typename S::T> weight, int k, uint32_t (&b)[S::kColumns][2]) {
#pragma unroll
    for (int j = 0; j < S::kColumns; j += 2) {
        const int row = first_column<S>() + j * 8 + lane() / 16 * 8 + lane() % 8;
        uint32_t r[4];
        ldmatrix_x4(r, weight + swizzled<kSlabDepth>(row, 2 * k + lane() / 8 % 2, row));
        b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
    }
}

// sums = conv3x3(pixels), for kPixels output pixels in rows of kWidth; input pixels are in rows of kPitch.
template <typename S, int kPixels, int kWidth, int kPitch, int kTiles>
DEVICE void convolve(const Args<typename S::T>& args, Shared<typename S::T> pixels, Slabs<S>& slabs,
                     Sums<kTiles, S::kColumns>& sums) {
    using T = typename S::T;
    int index[kTiles];  // index of the output pixel whose row of A this lane loads
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        index[i] = min(first_row() + i * 16 * kWarpsM + lane() % 16, kPixels - 1);
#pragma unroll
        for (int j = 0; j < S::kColumns; ++j) {
            for (float& d : sums.d[i][j]) d = 0;
        }
    }
    constexpr int kPerTap = S::kC / kSlabDepth;
#pragma unroll 1
    for (int slab = 0; slab < S::kSlabs; ++slab) {
        const Shared<T> weight = slabs.next(args);
        const int tap = slab / kPerTap, r = tap / 3, s = tap % 3;
        const int first_pack = slab % kPerTap * (kSlabDepth / kPack) + lane() / 16;
#pragma unroll
        for (int k = 0; k < kSlabDepth / 16; ++k) {
            uint32_t b[S::kColumns][2];
            load_b<S>(weight, k, b);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                if (first_row() + i * 16 * kWarpsM >= kPixels) continue;
                const int pixel = (index[i] / kWidth + r) * kPitch + index[i] % kWidth + s;
                const int key = index[i] + r * kWidth + s;
                uint32_t a[4];
                ldmatrix_x4(a, pixels + swizzled<S::kC>(pixel, first_pack + 2 * k, key));
#pragma unroll
                for (int j = 0; j < S::kColumns; ++j) mma_m16n8k16<T>(sums.d[i][j], a, b[j]);
            }
        }
    }
}

// Calls use(pixel, channel, sum, sum of the next channel) for all sums of a lane with pixels below kPixels.
template <typename S, int kPixels, int kTiles, typename Use>
DEVICE void for_each_pair(const Sums<kTiles, S::kColumns>& sums, const Use& use) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pixel = first_row() + i * 16 * kWarpsM + half * 8 + lane() / 4;
            if (pixel >= kPixels) continue;
#pragma unroll
            for (int j = 0; j < S::kColumns; ++j) {
                const int channel = first_column<S>() + j * 8 + lane() % 4 * 2;
                use(pixel, channel, sums.d[i][j][2 * half], sums.d[i][j][2 * half + 1]);
            }
        }
    }
}

// Scale and shift applied to two adjacent channels.
DEVICE void affine(Weights<float> scale, Weights<float> shift, int channel, float& a, float& b) {
    const Pack<float, 2> m = scale.load_pack<2>(channel), c = shift.load_pack<2>(channel);
    a = fmaf(m[0], a, c[0]);
    b = fmaf(m[1], b, c[1]);
}

// h of the tile; zeros outside the image, as padding of the second convolution.
template <typename S>
DEVICE void store_hidden(const Args<typename S::T>& args, const Tile& tile,
                         const Sums<S::kHiddenTiles, S::kColumns>& sums, Shared<typename S::T> hidden) {
    using T = typename S::T;
    for_each_pair<S, S::kHiddenPixels>(sums, [&](int pixel, int channel, float a, float b) {
        const int y = pixel / kHiddenW, x = pixel % kHiddenW;
        affine(args.scale1, args.shift1, channel, a, b);
        const bool in = inside(args, tile.y + y - 1, tile.x + x - 1);
        const float first = in ? activate(a, args.slope) : 0, second = in ? activate(b, args.slope) : 0;
        const Pack<T, 2> pair{narrow<T>(first), narrow<T>(second)};
        hidden.store_pack(swizzled<S::kC>(pixel, channel / kPack, hidden_key(y, x)) + channel % kPack, pair);
    });
}

// Writes the output tile to shared memory, from which it is stored in whole packs.
template <typename S>
DEVICE void store_result(const Args<typename S::T>& args, const Sums<S::kOutTiles, S::kColumns>& sums,
                         Shared<typename S::T> input, Shared<typename S::T> result) {
    using T = typename S::T;
    for_each_pair<S, S::kOutPixels>(sums, [&](int pixel, int channel, float a, float b) {
        const int y = pixel / kOutW + 2, x = pixel % kOutW + 2;
        affine(args.scale2, args.shift2, channel, a, b);
        const Pack<T, 2> residual = input.template load_pack<2>(
            swizzled<S::kC>(y * kInputW + x, channel / kPack, input_key(y, x)) + channel % kPack);
        const float first = widen(residual[0]), second = widen(residual[1]);
        a = activate(a + first, 0) + (args.skip ? first : 0);
        b = activate(b + second, 0) + (args.skip ? second : 0);
        const Pack<T, 2> pair{narrow<T>(a), narrow<T>(b)};
        result.store_pack(swizzled<S::kC>(pixel, channel / kPack, pixel) + channel % kPack, pair);
    });
}

template <typename S, bool kPacks>
DEVICE void store_output(const Args<typename S::T>& args, const Tile& tile, Shared<typename S::T> result) {
    using T = typename S::T;
    constexpr int kPerPixel = S::kC / kPack;
    for (int i = thread_index(); i < S::kOutPixels * kPerPixel; i += kThreads) {
        const int pixel = i / kPerPixel, channel = i % kPerPixel * kPack;
        const int y = tile.y + pixel / kOutW, x = tile.x + pixel % kOutW;
        if (!inside(args, y, x) || channel >= args.c) continue;
        const int64_t to = args.out.offset(tile.image, y, x) + channel;
        const Pack<T, kPack> values =
            result.template load_pack<kPack>(swizzled<S::kC>(pixel, channel / kPack, pixel));
        if constexpr (kPacks) {
            args.out.data.store_pack(to, values);
        } else {
            for (int k = 0; k < kPack && channel + k < args.c; ++k) args.out.data.store(to + k, values[k]);
        }
    }
}

template <typename S, bool kPacks>
KERNEL(kThreads, 1)
shared_block_kernel(const Args<typename S::T> args) {
    using T = typename S::T;
    const Shared<T> weight = shared<T>(0, S::kBuffers * S::kSlab);
    const Shared<T> input = shared<T>(S::kInputAt, S::kInputPixels * S::kC);
    const Shared<T> hidden = shared<T>(S::kHiddenAt, S::kHiddenPixels * S::kC);

    const int64_t mine = (args.tiles - block_index_x() + block_count_x() - 1) / block_count_x();
    Slabs<S> slabs{weight, 0, mine * 2 * S::kSlabs};
    slabs.start(args);
    release_next();
    wait_for_previous();

    Tile tile = tile_of(args, block_index_x(), S::kRows);
    load_input<S, kPacks>(args, tile, input);
    for (int64_t index = block_index_x(); index < args.tiles; index += block_count_x()) {
        cp_async_commit();  // on the first tile includes the copies of the weights
        cp_async_wait<0>();
        // Streamed weights already have a barrier with every slab.
        if constexpr (S::kResident) barrier();
        {
            Sums<S::kHiddenTiles, S::kColumns> sums;
            convolve<S, S::kHiddenPixels, kHiddenW, kInputW>(args, input, slabs, sums);
            store_hidden<S>(args, tile, sums, hidden);
        }
        if constexpr (S::kResident) barrier();
        Sums<S::kOutTiles, S::kColumns> sums;
        convolve<S, S::kOutPixels, kOutW, kHiddenW>(args, hidden, slabs, sums);
        barrier();  // h has been read: its memory is reused for the result
        store_result<S>(args, sums, input, hidden);
        barrier();
        const Tile done = tile;
        if (index + block_count_x() < args.tiles) {
            tile = tile_of(args, index + block_count_x(), S::kRows);
            load_input<S, kPacks>(args, tile, input);
        }
        store_output<S, kPacks>(args, done, hidden);
    }
}

template <typename S>
void launch_shape(const SharedBlock& op, Stream stream) {
    using T = typename S::T;
    const Nhwc& x = op.x;
    const int64_t tiles_y = ceil_div(x.h, S::kRows), tiles_x = ceil_div(x.w, kOutW);
    const Args<T> args{view<const T>(x),
                       weights(static_cast<const T*>(op.weight), S::kSlabs * S::kSlab),
                       weights(op.scale1, S::kC),
                       weights(op.shift1, S::kC),
                       weights(op.scale2, S::kC),
                       weights(op.shift2, S::kC),
                       view<T>(op.out),
                       static_cast<int>(x.h),
                       static_cast<int>(x.w),
                       static_cast<int>(x.c),
                       static_cast<int>(tiles_y),
                       static_cast<int>(tiles_x),
                       x.n * tiles_y * tiles_x,
                       op.slope,
                       op.skip};
    const bool packs = x.has_packs(kPack, sizeof(T)) && op.out.has_packs(kPack, sizeof(T));
    launch(packs ? shared_block_kernel<S, true> : shared_block_kernel<S, false>,
           {"shared_block", kThreads, S::kSharedBytes, stream}, {std::min(args.tiles, op.blocks)}, args);
}

template <typename T>
void launch_typed(const SharedBlock& op, Stream stream) {
    if (op.x.c <= 64) {
        if (op.rows == 12) return launch_shape<Shape<T, 64, 12>>(op, stream);
        if (op.rows == 8) return launch_shape<Shape<T, 64, 8>>(op, stream);
        if (op.rows == 4) return launch_shape<Shape<T, 64, 4>>(op, stream);
    } else {
        if (op.rows == 8) return launch_shape<Shape<T, 128, 8>>(op, stream);
        if (op.rows == 4) return launch_shape<Shape<T, 128, 4>>(op, stream);
    }
    throw std::runtime_error("shared_block: rows is " + std::to_string(op.rows) +
                             ", it may be 4 or 8, or 12 of up to 64 channels");
}

}  // namespace

void shared_block(const SharedBlock& op, Stream stream) {
    if (op.x.empty()) return;
    op.dtype == DType::bf16 ? launch_typed<BF16>(op, stream) : launch_typed<F16>(op, stream);
}

}  // namespace cuda
}  // namespace shelfkern
