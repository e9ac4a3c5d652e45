#include <type_traits>

#include "../common/parallel.h"
#include "conv_direct.h"
#include "dtypes.h"
#include "spans.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Size of one chunk of a strip and its sums: half of an L2, of 512 KiB or with AVX-512 1 MiB, leaving room
// for the weights that stream by.
constexpr int64_t kStripBytes = kMaxPanels == 1 ? 224 * 1024 : 448 * 1024;

// Packs elements into words, zero-filling the last one.
void pack_channels(Float32, const float* from, Float32::Word* to, int64_t count) {
    std::memcpy(to, from, count * sizeof(float));
}

void pack_channels(Float32, const bf16* from, Float32::Word* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
    for (; i < count; ++i) to[i] = load_one(from + i);
}

void pack_channels(Bfloat16, const bf16* from, Bfloat16::Word* to, int64_t count) {
    std::memcpy(to, from, count / 2 * sizeof(*to));
    if (count % 2) to[count / 2] = from[count - 1].bits;
}

void pack_channels(Int8, const uint8_t* from, Int8::Word* to, int64_t count) {
    const int64_t words = count / 4;
    std::memcpy(to, from, words * sizeof(*to));
    if (count % 4) {
        to[words] = 0;
        std::memcpy(to + words, from + 4 * words, count % 4);
    }
}

typedef uint8_t Bytes __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Wide __attribute__((vector_size(4 * kLanes)));

void pack_channels(Int16, const uint8_t* from, Int16::Word* to, int64_t count) {
    int64_t i = 0;
    for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
        const Wide wide = __builtin_convertvector(load_vector<Bytes>(from + i), Wide);
        std::memcpy(to + i / 2, &wide, sizeof(wide));
    }
    for (; i < count; i += 2) to[i / 2] = from[i] | (i + 1 < count ? from[i + 1] << 16 : 0);
}

template <typename Word>
void fill(Word* to, int64_t count, Word zero) {
    for (int64_t i = 0; i < count; ++i) to[i] = zero;
}

// The padding value outside the image.
template <typename P>
typename P::Word outside(const Conv& a) {
    if (std::is_same<P, Int8>::value) return static_cast<typename P::Word>(a.x_zero * 0x01010101u);
    return std::is_same<P, Int16>::value ? static_cast<typename P::Word>(a.x_zero * 0x00010001u) : 0;
}

// `count` pixels of a row, as one run where they are contiguous.
template <typename P, typename X>
void pack_pixels(const X* from, typename P::Word* to, int64_t count, int64_t c, int64_t width,
                 int64_t channels) {
    if (channels == c && c % P::kElements == 0) return pack_channels(P{}, from, to, count * c);
    for (int64_t x = 0; x < count; ++x) pack_channels(P{}, from + x * c, to + x * width, channels);
}

// Rows from `first_row` and columns from -pad_w of one image.
template <typename P, typename X>
void pack_strip(const Conv& a, const Shape& s, const X* image, int64_t first_row, int64_t rows,
                typename P::Word* to) {
    const int64_t columns = s.columns();
    const int64_t left = min(a.pad_w, columns);
    const int64_t inside = max(0, min(columns - left, a.w));
    const typename P::Word zero = outside<P>(a);
    for (int64_t i = 0; i < s.chunks(); ++i) {
        const int64_t width = s.chunk_width(i), first = i * s.chunk * P::kElements;
        const int64_t channels = min(width * P::kElements, a.c - first);
        for (int64_t r = 0; r < rows; ++r, to += columns * width) {
            const int64_t y = first_row + r;
            if (y < 0 || y >= a.h) {
                fill(to, columns * width, zero);
                continue;
            }
            const X* from = image + y * a.w * a.c + first;
            fill(to, left * width, zero);
            pack_pixels<P>(from, to + left * width, inside, a.c, width, channels);
            fill(to + (left + inside) * width, (columns - left - inside) * width, zero);
        }
    }
}

// How the output is divided into tasks: strips of rows, and groups of weight panels.
struct Cut {
    int64_t rows, strips, groups, panels;
};

// Each task reads its strip of the input and its group of the weights: of the cuts with enough tasks for the
// threads, the one that reads least.
Cut cut(const Conv& a, const Shape& s) {
    const int64_t panels = divide_up(a.out_c, kPanel);
    const int64_t sums = s.chunks() > 1 ? a.out_w * kMaxPanels * kPanel : 0;
    const int64_t row_bytes = (s.columns() * min(s.chunk, s.c) + sums) * 4;
    const int64_t fitting = max(1, (kStripBytes / row_bytes - s.kernel_h) / s.stride + 1);
    const int64_t tasks = a.threads == 1 ? 1 : 4 * a.threads;
    const int64_t weights = panels * s.panel_words(), input = a.h * a.w * s.c;
    Cut best{};
    int64_t least = 0;
    for (int64_t groups = 1; groups <= divide_up(panels, kMaxPanels); ++groups) {
        const int64_t strips = max(divide_up(a.out_h, fitting), min(a.out_h, divide_up(tasks, a.n * groups)));
        const int64_t rows = divide_up(a.out_h, strips), used = divide_up(a.out_h, rows);
        const int64_t read = used * weights + groups * input;
        if (groups == 1 || read < least) {
            best = {rows, used, groups, panels};
            least = read;
        }
    }
    return best;
}

// A 1x1 convolution reads its input in place if the pixels are whole words.
template <typename P, typename X>
bool used_in_place(const Conv& a, const Shape& s) {
    if (sizeof(X) * P::kElements != 4 || a.c % P::kElements) return false;
    return s.kernel_h * s.kernel_w == 1 && a.pad_h == 0 && a.pad_w == 0 && (a.out_h - 1) * a.stride < a.h &&
           (a.out_w - 1) * a.stride < a.w;
}

// The strip of one task, in the product's words.
template <typename P, typename X>
Input<P> input_of(const Conv& a, const Shape& s, int64_t n, int64_t y, int64_t out_rows) {
    using Word = typename P::Word;
    const X* image = static_cast<const X*>(a.x) + n * a.h * a.w * a.c;
    if (used_in_place<P, X>(a, s)) {
        return {reinterpret_cast<const Word*>(image) + y * a.stride * a.w * s.c, a.w * s.c, a.stride * s.c,
                nullptr};
    }
    const int64_t rows = s.input_rows(out_rows);
    Word* packed = static_cast<Word*>(thread_scratch(0, rows * s.columns() * s.c * 4));
    pack_strip<P>(a, s, image, y * a.stride - a.pad_h, rows, packed);
    return {packed, 0, 0, nullptr};
}

template <typename P, typename X>
void run(const Conv& a) {
    if (a.n * a.out_h * a.out_w == 0) return;
    Shape s{divide_up(a.c, P::kElements), a.chunk, a.kernel_h, a.kernel_w, a.stride, a.out_w, a.out_c};
    const Cut c = cut(a, s);
    Epilogue<X> epilogue = epilogue_of<X>(a);
    if (std::is_same<X, uint8_t>::value && !a.to_codes) {
        epilogue.out = nullptr;
        epilogue.floats = static_cast<float*>(a.out);
    }
    parallel_for(a.threads, a.n * c.strips * c.groups, [&](int64_t task) {
        const int64_t group = task % c.groups, strip = task / c.groups % c.strips;
        const int64_t n = task / c.groups / c.strips;
        const int64_t y = strip * c.rows, out_rows = min(c.rows, a.out_h - y);
        if (out_rows <= 0) return;
        Input<P> input = input_of<P, X>(a, s, n, y, out_rows);
        auto* sums =
            static_cast<typename P::Scalar*>(thread_scratch(1, out_rows * a.out_w * kMaxPanels * kPanel * 4));
        const int64_t at = n * a.stride_n + y * a.stride_h;
        const int64_t begin = group * c.panels / c.groups, end = (group + 1) * c.panels / c.groups;
        const auto* weight = static_cast<const typename P::Word*>(a.weight);
        if constexpr (std::is_same<X, uint8_t>::value) input.start = a.start;
        convolve_strip(s, input, out_rows, begin, end, weight, sums, epilogue.at(at));
    });
}

}  // namespace

void conv_bn_act(const Conv& args) {
    switch (args.product) {
        case Product::float32:
            return with_type<float, bf16>(args.dtype, [&](auto t) { run<Float32, decltype(t)>(args); });
        case Product::bfloat16:
            return run<Bfloat16, bf16>(args);
        case Product::int8:
            return run<Int8, uint8_t>(args);
        case Product::int16:
            return run<Int16, uint8_t>(args);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
