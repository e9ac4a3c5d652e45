#include "resize.cuh"
#include "upsample_argmax.h"

// A block computes a tile of labels. It stages the scores that the tile reads in shared memory, and each
// source pixel's own label. A resized score lies between its four sources, so where those have one label, all
// pixels between them have it too: most pixels of a segmentation need no arithmetic at all.
namespace shelfkern {
namespace cuda {
namespace {

constexpr int kQuad = 4;  // adjacent pixels per thread
constexpr int kWarpRows = 8, kWarpColumns = 4 * kQuad;
constexpr int kTileRows = 2 * kWarpRows, kTileColumns = 4 * kWarpColumns;
constexpr int kThreads = kTileRows * kTileColumns / kQuad, kWarps = kThreads / 32;
constexpr int kBatch = 5;  // source pixels that a warp loads at once: for an 8x resize, all of a tile's 40
constexpr int kMaxShared = 96 * 1024;        // two blocks per multiprocessor
constexpr int kNotFinite = -1, kMixed = -2;  // instead of a label

using Labels = Pack<uint8_t, kQuad>;

template <typename T>
struct Args {
    View<const T> scores;
    Global<uint8_t> labels;
    Axis rows, columns;
    int classes, out_h, out_w, tiles_y, tiles_x;
    int window_pixels;  // maximum of source pixels that a tile reads
    bool whole_quads;   // whether every quad of labels is inside and aligned
};

// A pixel of the result.
struct Place {
    int image, y, x;
};

template <typename T>
DEVICE Place tile_of_block(const Args<T>& args) {
    const int tile = block_index_x(), row = tile / args.tiles_x;
    return {row / args.tiles_y, row % args.tiles_y * kTileRows, tile % args.tiles_x * kTileColumns};
}

DEVICE Place quad_of_thread(const Place& tile) {
    constexpr int kAcross = kTileColumns / kWarpColumns, kQuads = kWarpColumns / kQuad;
    return {tile.image, tile.y + warp() / kAcross * kWarpRows + lane() / kQuads,
            tile.x + warp() % kAcross * kWarpColumns + lane() % kQuads * kQuad};
}

// Floats between staged pixels: an odd number of 16-byte packs, so that adjacent pixels' packs are in
// different banks.
HOST_DEVICE int staged_stride(int classes) { return ((classes + 3) / 4 | 1) * 4; }

// The source pixels that a tile reads.
struct Window {
    Shared<float> values;  // by pixel, then class
    Shared<int> labels;    // per pixel: its label, or kNotFinite if any of its scores is not finite
    int y, x, height, width, stride;

    DEVICE int index(int source_y, int source_x) const { return (source_y - y) * width + source_x - x; }
};

template <typename T>
DEVICE Window window_of_tile(const Args<T>& args, const Place& tile) {
    const int last_y = min(tile.y + kTileRows, args.out_h) - 1;
    const int last_x = min(tile.x + kTileColumns, args.out_w) - 1;
    const int y = tap(args.rows, tile.y).first, x = tap(args.columns, tile.x).first;
    const int stride = staged_stride(args.classes), floats = args.window_pixels * stride;
    return {shared<float>(0, floats),
            shared<int>(floats * 4, args.window_pixels),
            y,
            x,
            tap(args.rows, last_y).next - y + 1,
            tap(args.columns, last_x).next - x + 1,
            stride};
}

// A candidate for the first largest class; non-finite values are larger than all finite ones.
struct Best {
    float value;
    int label;

    DEVICE void meet(float other, int other_label) {
        if (other < value || (other == value && other_label > label)) return;
        value = other;
        label = other_label;
    }

    DEVICE void meet_score(float score, int k) {
        const bool finite = fabsf(score) <= kLargestFloat;
        meet(finite ? score : HUGE_VALF, finite ? k : kNotFinite);
    }

    DEVICE void meet_lanes() {
        for (int mask = 16; mask > 0; mask /= 2) meet(shuffle_xor(value, mask), shuffle_xor(label, mask));
    }
};

// Copies the window, one warp per pixel. The last pack of classes is filled with class 0, which never
// replaces the first.
template <typename T>
DEVICE void stage(const Args<T>& args, int image, const Window& window) {
    const int pixels = window.height * window.width, padded = (args.classes + 3) / 4 * 4;
    for (int begin = warp(); begin < pixels; begin += kBatch * kWarps) {
        int64_t from[kBatch];
        Best best[kBatch];
        for (int b = 0; b < kBatch; ++b) {
            const int pixel = min(begin + b * kWarps, pixels - 1);
            from[b] =
                args.scores.offset(image, window.y + pixel / window.width, window.x + pixel % window.width);
            best[b] = {-HUGE_VALF, args.classes};
        }
        for (int k = lane(); k < padded; k += 32) {
            T held[kBatch];
            for (int b = 0; b < kBatch; ++b)
                held[b] = args.scores.data.load(from[b] + (k < args.classes ? k : 0));
            for (int b = 0; b < kBatch; ++b) {
                const int pixel = begin + b * kWarps;
                const float score = widen(held[b]);
                if (pixel < pixels) window.values.store(pixel * window.stride + k, score);
                best[b].meet_score(score, k);
            }
        }
        for (int b = 0; b < kBatch; ++b) {
            const int pixel = begin + b * kWarps;
            best[b].meet_lanes();
            if (pixel < pixels && lane() == 0) window.labels.store(pixel, best[b].label);
        }
    }
}

// The common label of all source pixels between the taps, or kMixed or kNotFinite.
DEVICE int common_label(const Window& window, const Tap& y, int first, int last) {
    const int label = window.labels.load(window.index(y.first, first));
    bool same = true, finite = true;
    for (int x = first; x <= last; ++x) {
        const int top = window.labels.load(window.index(y.first, x));
        const int bottom = window.labels.load(window.index(y.next, x));
        same = same && top == label && bottom == label;
        finite = finite && top >= 0 && bottom >= 0;
    }
    return !finite ? kNotFinite : same ? label : kMixed;
}

// The labels of a quad whose sources are finite and within kColumns adjacent columns. Each column is blended
// between its two rows once, and every pixel uses all columns, most with weight 0.
template <int kColumns>
DEVICE Labels blended_labels(const Window& window, int classes, const Tap& y, const Tap (&x)[kQuad]) {
    float weight[kQuad][kColumns];
    for (int i = 0; i < kQuad; ++i) {
        for (int j = 0; j < kColumns; ++j) {
            const int source = x[0].first + j;
            // Both taps may be the last column.
            weight[i][j] =
                (source == x[i].first ? 1 - x[i].fraction : 0) + (source == x[i].next ? x[i].fraction : 0);
        }
    }
    int top[kColumns], bottom[kColumns];
    for (int j = 0; j < kColumns; ++j) {
        // Columns beyond the last may be non-finite, which a weight of 0 does not remove.
        const int source = min(x[0].first + j, x[kQuad - 1].next);
        top[j] = window.index(y.first, source) * window.stride;
        bottom[j] = window.index(y.next, source) * window.stride;
    }
    float best[kQuad];
    int label[kQuad] = {};
    for (int i = 0; i < kQuad; ++i) best[i] = -HUGE_VALF;
    for (int k = 0; k < classes; k += 4) {
        Pack<float, 4> column[kColumns];
        for (int j = 0; j < kColumns; ++j) {
            const Pack<float, 4> above = window.values.load_pack<4>(top[j] + k);
            const Pack<float, 4> below = window.values.load_pack<4>(bottom[j] + k);
            for (int m = 0; m < 4; ++m) column[j][m] = blend(above[m], below[m], y.fraction);
        }
        for (int i = 0; i < kQuad; ++i) {
            for (int m = 0; m < 4; ++m) {
                float value = 0;
                for (int j = 0; j < kColumns; ++j) value += weight[i][j] * column[j][m];
                if (value > best[i]) best[i] = value, label[i] = k + m;
            }
        }
    }
    return {{static_cast<uint8_t>(label[0]), static_cast<uint8_t>(label[1]), static_cast<uint8_t>(label[2]),
             static_cast<uint8_t>(label[3])}};
}

// The first class with the largest value; NaN counts as largest, as in torch.
template <typename T>
DEVICE uint8_t plain_label(const Pixel<T>& pixel, int classes) {
    float best = pixel.value(0);
    int label = 0;
    for (int k = 1; k < classes; ++k) {
        const float value = pixel.value(k);
        if (value > best || (value != value && best == best)) best = value, label = k;
    }
    return static_cast<uint8_t>(label);
}

template <typename T>
DEVICE Labels plain_labels(const Args<T>& args, int image, const Tap& y, const Tap (&x)[kQuad]) {
    Labels labels;
    for (int i = 0; i < kQuad; ++i) {
        labels[i] = plain_label(pixel(args.scores, image, y, x[i]), args.classes);
    }
    return labels;
}

// Computes the quad at a place, if that is inside, with make(y tap, x taps).
template <typename T, typename Make>
DEVICE void make_quad(const Args<T>& args, const Place& quad, const Make& make) {
    if (quad.y >= args.out_h || quad.x >= args.out_w) return;
    Tap x[kQuad];
    for (int i = 0; i < kQuad; ++i) x[i] = tap(args.columns, min(quad.x + i, args.out_w - 1));
    const Labels labels = make(tap(args.rows, quad.y), x);
    const int64_t to = (int64_t{quad.image} * args.out_h + quad.y) * args.out_w + quad.x;
    if (args.whole_quads) return args.labels.store_pack(to, labels);
    for (int i = 0; i < kQuad; ++i) {
        if (quad.x + i < args.out_w) args.labels.store(to + i, labels[i]);
    }
}

template <typename T, int kColumns>
KERNEL(kThreads)
staged_kernel(const Args<T> args) {
    release_next();
    const Place tile = tile_of_block(args);
    const Window window = window_of_tile(args, tile);
    wait_for_previous();
    stage(args, tile.image, window);
    barrier();
    make_quad(args, quad_of_thread(tile), [&](const Tap& y, const Tap(&x)[kQuad]) {
        const int label = common_label(window, y, x[0].first, x[kQuad - 1].next);
        if (label >= 0) {
            const uint8_t byte = static_cast<uint8_t>(label);
            return Labels{{byte, byte, byte, byte}};
        }
        if (label == kMixed && x[kQuad - 1].next - x[0].first < kColumns) {
            return blended_labels<kColumns>(window, args.classes, y, x);
        }
        return plain_labels(args, tile.image, y, x);
    });
}

// For scores too large for shared memory, and for fewer columns than the source has.
template <typename T>
KERNEL(kThreads)
plain_kernel(const Args<T> args) {
    release_next();
    wait_for_previous();
    const Place tile = tile_of_block(args);
    make_quad(args, quad_of_thread(tile),
              [&](const Tap& y, const Tap(&x)[kQuad]) { return plain_labels(args, tile.image, y, x); });
}

template <typename T>
void launch_type(const UpsampleArgmax& op, Stream stream) {
    const Nhwc& scores = op.scores;
    const Axis rows = make_axis(scores.h, op.full_h, op.align_corners);
    const Axis columns = make_axis(scores.w, op.full_w, op.align_corners);
    const int64_t tiles_y = ceil_div(op.out_h, kTileRows), tiles_x = ceil_div(op.out_w, kTileColumns);
    const int64_t window_pixels = rows.reach(kTileRows) * columns.reach(kTileColumns);
    const int classes = static_cast<int>(scores.c);
    const bool aligned = reinterpret_cast<uintptr_t>(op.labels) % kQuad == 0;
    const Args<T> args{view<const T>(scores),
                       global(op.labels, scores.n * op.out_h * op.out_w),
                       rows,
                       columns,
                       classes,
                       static_cast<int>(op.out_h),
                       static_cast<int>(op.out_w),
                       static_cast<int>(tiles_y),
                       static_cast<int>(tiles_x),
                       static_cast<int>(window_pixels),
                       aligned && op.out_w % kQuad == 0};
    const int64_t shared_bytes = window_pixels * (staged_stride(classes) + 1) * 4;
    const bool staged = shared_bytes <= kMaxShared && columns.step <= 1;
    const Launch how{"upsample_argmax", kThreads, staged ? static_cast<int>(shared_bytes) : 0, stream};
    const Grid grid{tiles_y * tiles_x * scores.n};
    if (!staged) {
        launch(plain_kernel<T>, how, grid, args);
    } else if (columns.step * (kQuad - 1) < 1) {
        launch(staged_kernel<T, 3>, how, grid, args);
    } else {
        launch(staged_kernel<T, kQuad + 1>, how, grid, args);
    }
}

}  // namespace

void upsample_argmax(const UpsampleArgmax& op, Stream stream) {
    with_type("upsample_argmax", op.dtype, [&](auto type) { launch_type<decltype(type)>(op, stream); });
}

}  // namespace cuda
}  // namespace shelfkern
