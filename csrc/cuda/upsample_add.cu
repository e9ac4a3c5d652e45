#include <algorithm>

#include "primitives.cuh"
#include "upsample_add.h"

namespace shelfkern {
namespace cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Args {
    View<const T> x, skip;
    Global<const float> gate;
    View<T> out;
    int n, h, w, c;
};

template <int N>
DEVICE Pack<float, N> load_gate(Global<const float> gate, int64_t i) {
    constexpr int kStep = N < 4 ? N : 4;
    Pack<float, N> values;
    for (int k = 0; k < N; k += kStep) {
        const Pack<float, kStep> part = gate.template load_pack<kStep>(i + k);
        for (int j = 0; j < kStep; ++j) values[k + j] = part[j];
    }
    return values;
}

// A thread adds N channels of one input pixel to the four output pixels that it covers: x is read once.
template <typename T, int N>
KERNEL(kThreads)
upsample_add_kernel(const Args<T> args) {
    release_next();
    const int packs = args.c / N;
    const int64_t thread = int64_t{block_index_x()} * kThreads + thread_index();
    if (thread >= int64_t{args.h} * args.w * packs) return;
    wait_for_previous();

    const unsigned index = static_cast<unsigned>(thread), pixel = index / packs;
    const int channel = index % packs * N, y = pixel / args.w, x = pixel % args.w;
#pragma unroll 1
    for (int image = block_index_y(); image < args.n; image += block_count_y()) {
        const Pack<T, N> input = args.x.data.template load_pack<N>(args.x.offset(image, y, x) + channel);
        Pack<float, N> gate;
        for (int i = 0; i < N; ++i) gate[i] = 1.0f;
        if (args.gate) gate = load_gate<N>(args.gate, int64_t{image} * args.c + channel);
        for (int corner = 0; corner < 4; ++corner) {
            const int out_y = 2 * y + corner / 2, out_x = 2 * x + corner % 2;
            const int64_t from = args.skip.offset(image, out_y, out_x) + channel;
            Pack<T, N> result = args.skip.data.template load_pack<N>(from);
            for (int i = 0; i < N; ++i) {
                result[i] = narrow<T>(fmaf(gate[i], widen(input[i]), widen(result[i])));
            }
            args.out.data.store_pack(args.out.offset(image, out_y, out_x) + channel, result);
        }
    }
}

template <typename T, int N>
void launch_packs(const UpsampleAdd& op, Stream stream) {
    const Nhwc& x = op.x;
    const int64_t threads = x.h * x.w * (x.c / N);
    if (threads > 0x7fffffff) {
        throw std::runtime_error("upsample_add: x has " + std::to_string(threads) +
                                 " packs an image, it may have 2147483647");
    }
    const Args<T> args{view<const T>(x),      view<const T>(op.skip), global(op.gate, x.n * x.c),
                       view<T>(op.out),       static_cast<int>(x.n),  static_cast<int>(x.h),
                       static_cast<int>(x.w), static_cast<int>(x.c)};
    launch(upsample_add_kernel<T, N>, {"upsample_add", kThreads, 0, stream},
           {ceil_div(threads, kThreads), std::min(x.n, kMaxGridYZ)}, args);
}

template <typename T>
void launch_type(const UpsampleAdd& op, Stream stream) {
    constexpr int kPack = 16 / sizeof(T);
    const auto fits = [](const Nhwc& t) { return t.has_packs(kPack, sizeof(T)); };
    const bool gate_fits = reinterpret_cast<uintptr_t>(op.gate) % 16 == 0;
    if (fits(op.x) && fits(op.skip) && fits(op.out) && gate_fits) {
        launch_packs<T, kPack>(op, stream);
    } else {
        launch_packs<T, 1>(op, stream);
    }
}

}  // namespace

void upsample_add(const UpsampleAdd& op, Stream stream) {
    with_type("upsample_add", op.dtype, [&](auto type) { launch_type<decltype(type)>(op, stream); });
}

}  // namespace cuda
}  // namespace shelfkern
