#include "attention_gate.h"
#include "primitives.cuh"

// Two kernels, since all of x must be read before the first output: sums over slices of the pixels, with
// enough slices to fill the GPU, then the matrix-vector product. Every sum has a fixed order.

namespace shelfkern {
namespace cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// N: elements per load. Adjacent threads cover 128 bytes of a pixel's channels, or 32 channels.
template <typename T_, int N_>
struct Shape {
    using T = T_;
    static constexpr int N = N_;
    static constexpr int kColumns = N == 1 ? 32 : 8, kRows = kThreads / kColumns;
    static constexpr int kChannels = kColumns * N;
    static constexpr int kAhead = 4;  // loads in flight per thread
};

template <typename T>
struct SliceArgs {
    View<const T> x;
    Global<float> sums;
    int w, c, groups;  // groups: of channels
    unsigned pixels, slices;
};

// A thread's share of pixels [first, last). Four pixels are added in float32 and the rest in float64: few
// conversions, and no loss of precision over large images.
template <typename S>
DEVICE Pack<double, S::N> sum_pixels(const SliceArgs<typename S::T>& args, int64_t image, int channel,
                                     unsigned first, unsigned last) {
    using T = typename S::T;
    Pack<double, S::N> sums{};
    for (unsigned begin = first; begin < last; begin += S::kAhead * S::kRows) {
        Pack<T, S::N> packs[S::kAhead] = {};
#pragma unroll
        for (int i = 0; i < S::kAhead; ++i) {
            const unsigned pixel = begin + i * S::kRows, y = pixel / args.w, x = pixel % args.w;
            if (pixel >= last) continue;
            packs[i] = args.x.data.template load_pack<S::N>(args.x.offset(image, y, x) + channel);
        }
#pragma unroll
        for (int k = 0; k < S::N; ++k) {
            float sum = 0;
            for (const Pack<T, S::N>& pack : packs) sum += widen(pack[k]);
            sums[k] += sum;
        }
    }
    return sums;
}

// A block sums a slice of an image's pixels for a group of channels.
template <typename S>
KERNEL(kThreads, 4)
sum_slices_kernel(const SliceArgs<typename S::T> args) {
    release_next();
    const Shared<float> warp_sums = shared<float>(0, kWarps * S::kChannels);
    const unsigned block = block_index_x(), slice = block % args.slices;
    const int group = block / args.slices % args.groups, image = block / args.slices / args.groups;
    const int column = thread_index() % S::kColumns, row = thread_index() / S::kColumns;
    const int first_channel = group * S::kChannels, channel = first_channel + column * S::N;
    const auto border = [&](unsigned i) {
        return static_cast<unsigned>(uint64_t{args.pixels} * i / args.slices);
    };
    wait_for_previous();

    Pack<double, S::N> sums{};
    if (channel < args.c) sums = sum_pixels<S>(args, image, channel, border(slice) + row, border(slice + 1));
#pragma unroll
    for (int k = 0; k < S::N; ++k) {
        float sum = static_cast<float>(sums[k]);
#pragma unroll
        for (int mask = S::kColumns; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane() < S::kColumns) warp_sums.store(warp() * S::kChannels + column * S::N + k, sum);
    }
    barrier();
    const int mine = thread_index();
    if (mine >= S::kChannels || first_channel + mine >= args.c) return;
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += warp_sums.load(i * S::kChannels + mine);
    args.sums.store((int64_t{image} * args.slices + slice) * args.c + first_channel + mine, sum);
}

struct GateArgs {
    Global<const float> sums;
    Weights<float> weight, scale, shift;
    Global<float> out;
    int slices, c, k;
    float pixels;
};

constexpr int kChunk = kThreads;  // channels per iteration

// The means of up to kChunk channels from `first`, valid after a barrier. The warps share the slices.
DEVICE void mean_of_slices(const GateArgs& args, int64_t image, int first, Shared<float> warp_sums,
                           Shared<float> means) {
    for (int i = lane(); i < kChunk && first + i < args.c; i += 32) {
        float sum = 0;
#pragma unroll 4
        for (int slice = warp(); slice < args.slices; slice += kWarps) {
            sum += args.sums.load((image * args.slices + slice) * args.c + first + i);
        }
        warp_sums.store(warp() * kChunk + i, sum);
    }
    barrier();
    const int mine = thread_index();
    if (first + mine >= args.c) return;
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += warp_sums.load(i * kChunk + mine);
    means.store(mine, sum / args.pixels);
}

// Each warp computes one output of an image.
KERNEL(kThreads)
gate_kernel(const GateArgs args) {
    release_next();
    const Shared<float> warp_sums = shared<float>(0, kWarps * kChunk);
    const Shared<float> means = shared<float>(kWarps * kChunk * 4, kChunk);
    const int groups = (args.k + kWarps - 1) / kWarps, image = block_index_x() / groups;
    const int output = block_index_x() % groups * kWarps + warp();
    wait_for_previous();

    float dot = 0;
    for (int first = 0; first < args.c; first += kChunk) {
        mean_of_slices(args, image, first, warp_sums, means);
        barrier();
        for (int i = lane(); output < args.k && i < kChunk && first + i < args.c; i += 32) {
            dot = fmaf(args.weight.load(int64_t{output} * args.c + first + i), means.load(i), dot);
        }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) dot += shuffle_xor(dot, mask);
    if (output >= args.k || lane() > 0) return;
    const float z = fmaf(args.scale.load(output), dot, args.shift.load(output));
    args.out.store(int64_t{image} * args.k + output, 1 / (1 + expf(-z)));
}

template <typename S>
void launch_slices(const AttentionGate& op, Stream stream) {
    const Nhwc& x = op.x;
    const int64_t groups = ceil_div(x.c, S::kChannels);
    const SliceArgs<typename S::T> args{
        view<const typename S::T>(x),    global(op.sums, x.n * op.slices * x.c),
        static_cast<int>(x.w),           static_cast<int>(x.c),
        static_cast<int>(groups),        static_cast<unsigned>(x.h * x.w),
        static_cast<unsigned>(op.slices)};
    launch(sum_slices_kernel<S>, {"attention_gate", kThreads, kWarps * S::kChannels * 4, stream},
           {x.n * groups * op.slices}, args);
}

template <typename T>
void launch_type(const AttentionGate& op, Stream stream) {
    constexpr int kPack = 16 / sizeof(T);
    if (op.x.has_packs(kPack, sizeof(T))) {
        launch_slices<Shape<T, kPack>>(op, stream);
    } else {
        launch_slices<Shape<T, 1>>(op, stream);
    }
}

}  // namespace

void attention_gate(const AttentionGate& op, Stream stream) {
    const Nhwc& x = op.x;
    const int64_t pixels = x.h * x.w;
    if (pixels > 0x7fffffff) {
        throw std::runtime_error("attention_gate: x has " + std::to_string(pixels) +
                                 " pixels an image, it may have 2147483647");
    }
    with_type("attention_gate", op.dtype, [&](auto type) { launch_type<decltype(type)>(op, stream); });
    const GateArgs args{global(static_cast<const float*>(op.sums), x.n * op.slices * x.c),
                        weights(op.weight, op.k * x.c),
                        weights(op.scale, op.k),
                        weights(op.shift, op.k),
                        global(op.out, x.n * op.k),
                        static_cast<int>(op.slices),
                        static_cast<int>(x.c),
                        static_cast<int>(op.k),
                        static_cast<float>(pixels)};
    // Only the sums come from the previous kernel: the weights may be read while they are computed.
    const Stream after{stream.handle, true};
    launch(gate_kernel, {"attention_gate", kThreads, (kWarps + 1) * kChunk * 4, after},
           {x.n * ceil_div(op.k, kWarps)}, args);
}

}  // namespace cuda
}  // namespace shelfkern
