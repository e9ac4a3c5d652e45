#include "resize.cuh"
#include "upsample_softmax_sum.h"

// A warp computes a strip: some adjacent pixels of one row, in all classes. It blends the strip's two source
// rows into its part of shared memory, one class at a time; then each class of the strip is one coalesced
// read and write of out.
namespace shelfkern {
namespace cuda {
namespace {

constexpr int kPixels = 2;  // per thread, 32 columns apart
constexpr int kStrip = 32 * kPixels;
constexpr int kMaxWarps = 8;
constexpr int kBatch = 4;              // columns, or classes, with loads in flight together
constexpr int kMaxShared = 96 * 1024;  // two blocks per multiprocessor

template <typename T>
struct Args {
    View<const T> scores;
    Global<float> out;
    int64_t stride_n, stride_c, stride_h;
    Axis rows, columns;
    int classes, out_h, out_w, warps;
    int64_t strips_x, strips;
    int stride;  // between classes of blended rows: odd, so that adjacent classes are in different banks
    bool exp;
};

// The first pixel of a strip.
struct Strip {
    int64_t image;
    int y, x;
};

// The blended row of a strip, from source column `first`.
struct Row {
    Shared<float> values;
    int first, stride;
};

// A pixel of a blended row.
struct StagedPixel {
    Row row;
    Tap x;

    DEVICE float value(int k) const {
        const int at = k * row.stride - row.first;
        return blend(row.values.load(at + x.first), row.values.load(at + x.next), x.fraction);
    }
};

// Blends the source rows over the columns that a strip reads; adjacent lanes take adjacent classes.
template <typename T>
DEVICE Row stage(const Args<T>& args, const Strip& strip) {
    const int last = min(strip.x + kStrip, args.out_w) - 1;
    const Tap one = tap(args.columns, strip.x), other = tap(args.columns, last);
    const int begin = min(one.first, other.first), end = max(one.next, other.next) + 1;
    const int floats = args.classes * args.stride;
    const Row row{shared<float>(warp() * floats * 4, floats), begin, args.stride};
    const Tap y = tap(args.rows, strip.y);
    const int64_t top = args.scores.offset(strip.image, y.first, 0);
    const int64_t bottom = args.scores.offset(strip.image, y.next, 0);
    for (int k = lane(); k < args.classes; k += 32) {
        for (int x = begin; x < end; x += kBatch) {
            T above[kBatch], below[kBatch];
            for (int b = 0; b < kBatch; ++b) {
                const int64_t at = min(x + b, end - 1) * args.scores.stride_w + k;
                above[b] = args.scores.data.load(top + at);
                below[b] = args.scores.data.load(bottom + at);
            }
            for (int b = 0; b < kBatch && x + b < end; ++b) {
                row.values.store(k * args.stride + x + b - begin,
                                 blend(widen(above[b]), widen(below[b]), y.fraction));
            }
        }
    }
    warp_barrier();
    return row;
}

// Converts a pixel's values into the terms to add: exp(value - shift) * scale.
struct Softmax {
    float shift, scale;
};

// The maximum and the sum of exponentials in one pass, rescaling the sum when the maximum grows.
template <typename P>
DEVICE Softmax softmax(const P& pixel, int classes) {
    float greatest = -kLargestFloat, sum = 0;
    for (int k = 0; k < classes; ++k) {
        const float value = pixel.value(k);
        const float smaller = expf(-fabsf(value - greatest));
        sum = value > greatest ? sum * smaller + 1 : sum + smaller;
        greatest = value > greatest ? value : greatest;
    }
    // A maximum of infinity makes all NaN, as in torch.
    return {greatest, 1 / (sum + (greatest - greatest))};
}

// Adds a thread's pixels, except those beyond the last column.
template <typename T, typename P>
DEVICE void add(const Args<T>& args, const Strip& strip, const P (&pixels)[kPixels]) {
    Softmax f[kPixels];
    for (int i = 0; i < kPixels; ++i) {
        f[i] = args.exp ? Softmax{0, 1} : softmax(pixels[i], args.classes);
    }
    const int x = strip.x + lane();
    const int64_t out = strip.image * args.stride_n + strip.y * args.stride_h + x;
    for (int begin = 0; begin < args.classes; begin += kBatch) {
        const auto each = [&](auto&& visit) {
            for (int b = 0; b < kBatch; ++b) {
                for (int i = 0; i < kPixels; ++i) {
                    const bool made = begin + b < args.classes && x + 32 * i < args.out_w;
                    if (made) visit(b, i, out + (begin + b) * args.stride_c + 32 * i);
                }
            }
        };
        float total[kBatch][kPixels];
        each([&](int b, int i, int64_t at) { total[b][i] = args.out.load(at); });
        each([&](int b, int i, int64_t at) {
            const float value = pixels[i].value(begin + b);
            args.out.store(at, total[b][i] + expf(value - f[i].shift) * f[i].scale);
        });
    }
}

template <typename T, bool kStaged>
KERNEL(32 * kMaxWarps)
softmax_sum_kernel(const Args<T> args) {
    release_next();
    const int64_t index = int64_t{block_index_x()} * args.warps + warp();
    if (index >= args.strips) return;
    const int64_t row = index / args.strips_x;
    const Strip strip{row / args.out_h, static_cast<int>(row % args.out_h),
                      static_cast<int>(index % args.strips_x) * kStrip};
    Tap x[kPixels];
    for (int i = 0; i < kPixels; ++i) {
        x[i] = tap(args.columns, min(strip.x + lane() + 32 * i, args.out_w - 1));
    }
    wait_for_previous();
    if constexpr (kStaged) {
        const Row row = stage(args, strip);
        const StagedPixel pixels[kPixels] = {{row, x[0]}, {row, x[1]}};
        add(args, strip, pixels);
    } else {
        const Tap y = tap(args.rows, strip.y);
        const Pixel<T> pixels[kPixels] = {pixel(args.scores, strip.image, y, x[0]),
                                          pixel(args.scores, strip.image, y, x[1])};
        add(args, strip, pixels);
    }
}

template <typename T>
void launch_type(const UpsampleSoftmaxSum& op, Stream stream) {
    const Nhwc& scores = op.scores;
    const Axis columns = make_axis(scores.w, op.full_w, op.align_corners, op.mirror);
    const int64_t stride = columns.reach(kStrip) | 1, warp_bytes = scores.c * stride * 4;
    const bool staged = warp_bytes <= kMaxShared;
    const int warps =
        static_cast<int>(staged ? std::min<int64_t>(kMaxWarps, kMaxShared / warp_bytes) : kMaxWarps);
    const int64_t strips_x = ceil_div(op.out_w, kStrip), strips = scores.n * op.out_h * strips_x;
    const int64_t last =
        (scores.n - 1) * op.stride_n + (scores.c - 1) * op.stride_c + (op.out_h - 1) * op.stride_h;
    const Args<T> args{view<const T>(scores),
                       global(op.out, last + op.out_w),
                       op.stride_n,
                       op.stride_c,
                       op.stride_h,
                       make_axis(scores.h, op.full_h, op.align_corners),
                       columns,
                       static_cast<int>(scores.c),
                       static_cast<int>(op.out_h),
                       static_cast<int>(op.out_w),
                       warps,
                       strips_x,
                       strips,
                       static_cast<int>(stride),
                       op.exp};
    const int shared_bytes = staged ? static_cast<int>(warps * warp_bytes) : 0;
    const Launch how{"upsample_softmax_sum", 32 * warps, shared_bytes, stream};
    launch(staged ? softmax_sum_kernel<T, true> : softmax_sum_kernel<T, false>, how,
           {ceil_div(strips, warps)}, args);
}

}  // namespace

void upsample_softmax_sum(const UpsampleSoftmaxSum& op, Stream stream) {
    if (op.scores.empty()) return;
    with_type("upsample_softmax_sum", op.dtype, [&](auto type) { launch_type<decltype(type)>(op, stream); });
}

}  // namespace cuda
}  // namespace shelfkern
