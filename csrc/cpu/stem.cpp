#include <algorithm>
#include <type_traits>

#include "../common/parallel.h"
#include "conv_direct.h"
#include "dtypes.h"
#include "stem_rows.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int64_t kKernel = 7, kStride = 2, kPad = 3;
// Pooled rows per task: they need 2 * 8 + 1 rows of the convolution, one of which is computed twice.
constexpr int64_t kPooledRows = 8;

// Layout of a row of pixels in words: pixels of three floats or three bfloat16, which may straddle words, or
// of four 8-bit values, the last of them unused. The seven pixels of a kernel row begin at a word for every
// output pixel.
template <typename P>
struct Pixels {
    using Element = typename std::conditional<std::is_same<P, Float32>::value, float, bf16>::type;
    static constexpr int64_t kElements = 3;  // per pixel
};

template <>
struct Pixels<Int8> {
    using Element = uint32_t;
    static constexpr int64_t kElements = 1;
};

template <typename P>
constexpr int64_t words_of(int64_t pixels) {
    const int64_t bytes = pixels * Pixels<P>::kElements * sizeof(typename Pixels<P>::Element);
    return (bytes + 3) / 4;
}

// A row of normalised pixels.
void read_pixels(StemRows& rows, int64_t y, int64_t count, float* to) { rows.read(y, count, to); }

void read_pixels(StemRows& rows, int64_t y, int64_t count, bf16* to) {
    const int64_t floats = 3 * count;
    float* row = static_cast<float*>(thread_scratch(2, (floats + kLanes) * 4));
    rows.read(y, count, row);
    for (int64_t i = 0; i < floats; i += kLanes) {
        store_up_to(to + i, load(row + i), static_cast<int>(std::min<int64_t>(floats - i, kLanes)));
    }
}

// A row of raw pixels.
void read_pixels(StemRows& rows, int64_t y, int64_t count, uint32_t* to) {
    if (const uint8_t* from = rows.raw(y)) {
        for (int64_t x = 0; x < count; ++x, from += 3) to[x] = from[0] | from[1] << 8 | from[2] << 16;
        return;
    }
    const int64_t room = 3 * count + kLanes;
    float* row = static_cast<float*>(thread_scratch(2, room * 5));
    uint8_t* codes = reinterpret_cast<uint8_t*>(row + room);
    rows.read(y, count, row);
    // The channels' positions in the vectors repeat every three vectors.
    vf scale[3], shift[3];
    for (int i = 0; i < 3 * kLanes; ++i) {
        scale[i / kLanes][i % kLanes] = rows.of.raw[i % 3];
        shift[i / kLanes][i % kLanes] = rows.of.raw[3 + i % 3];
    }
    for (int64_t i = 0; i < 3 * count; i += kLanes) {
        const int64_t v = i / kLanes % 3;
        store(codes + i, load(row + i) * scale[v] + shift[v]);
    }
    for (int64_t x = 0; x < count; ++x) {
        to[x] = codes[3 * x] | codes[3 * x + 1] << 8 | codes[3 * x + 2] << 16;
    }
}

template <typename P>
void pack_image(StemRows& image, int64_t columns, int64_t first_row, int64_t rows, typename P::Word* to) {
    using Element = typename Pixels<P>::Element;
    constexpr int64_t kElements = Pixels<P>::kElements;
    const int64_t inside = std::min(columns - kPad, image.columns);
    Element zero{};
    if constexpr (std::is_same<P, Int8>::value) zero = image.of.zero;
    for (int64_t r = 0; r < rows; ++r, to += words_of<P>(columns)) {
        const int64_t y = first_row + r;
        Element* row = reinterpret_cast<Element*>(to);
        Element* const end = reinterpret_cast<Element*>(to + words_of<P>(columns));
        if (y < 0 || y >= image.rows) {
            std::fill(row, end, zero);
            continue;
        }
        std::fill(row, row + kElements * kPad, zero);
        row += kElements * kPad;
        read_pixels(image, y, inside, row);
        std::fill(row + kElements * inside, end, zero);
    }
}

// The rows of features that a row of pooled pixels reads.
template <typename F>
struct Window {
    const F* rows[3];
    int count;
};

// The maximum of up to 3 x 3 pixels, columns x0 to x1, for `count` channels from k.
template <typename F>
inline __attribute__((always_inline)) vf greatest(const Window<F>& window, int64_t c, int64_t k, int count,
                                                  int64_t x0, int64_t x1) {
    vf best = load_up_to(window.rows[0] + x0 * c + k, count);
    for (int y = 0; y < window.count; ++y) {
        const F* row = window.rows[y] + k;
        for (int64_t x = x0; x < x1; ++x) {
            const vf v = load_up_to(row + x * c, count);
            best = ((v > best) | (v != v)) ? v : best;  // NaN propagates, as in torch
        }
    }
    return best;
}

// All channels of one pooled pixel.
template <typename F>
void pool_pixel(const Window<F>& window, int64_t c, int64_t x0, int64_t x1, F* out) {
    int64_t k = 0;
    for (; k + kLanes <= c; k += kLanes) store(out + k, greatest(window, c, k, kLanes, x0, x1));
    if (k == c) return;
    const int count = static_cast<int>(c - k);
    store_some(out + k, greatest(window, c, k, count, x0, x1), count);
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

void pool_pixel(const Window<uint8_t>& window, int64_t c, int64_t x0, int64_t x1, uint8_t* out) {
    int64_t k = 0;
    for (; k + 16 <= c; k += 16) {
        Bytes best = {};
        for (int y = 0; y < window.count; ++y) {
            for (int64_t x = x0; x < x1; ++x) {
                const Bytes v = load_vector<Bytes>(window.rows[y] + x * c + k);
                best = v > best ? v : best;
            }
        }
        std::memcpy(out + k, &best, 16);
    }
    for (; k < c; ++k) {
        out[k] = 0;
        for (int y = 0; y < window.count; ++y) {
            for (int64_t x = x0; x < x1; ++x) out[k] = std::max(out[k], window.rows[y][x * c + k]);
        }
    }
}

// Pools rows of features into `to`: values may be rounded before pooling.
template <typename F>
Epilogue<F> epilogue_of(const Stem& a, F* to, int64_t row) {
    Epilogue<F> e{};
    e.scale = a.scale;
    e.shift = a.shift;
    e.out = to;
    e.row = row;
    e.pixel = a.out_c;
    e.slope = a.slope;
    e.bias = a.bias;
    return e;
}

// Rows [begin, end) of pooled pixels. Only the feature rows that the next row reads are kept, alternating
// between two pairs of rows, so that they stay in L2.
template <typename P, typename T>
void run_rows(const Stem& a, const ColumnTaps& taps, int64_t n, int64_t begin, int64_t end) {
    using Word = typename P::Word;
    const int64_t out_h = a.h / 4, out_w = a.w / 4, columns = (a.w / 2 - 1) * kStride + kKernel;
    const int64_t words = words_of<P>(columns), pixel = words_of<P>(kStride), run = words_of<P>(kKernel);
    const int64_t first = begin ? 2 * begin - 1 : 0, top = first * kStride - kPad;
    const int64_t rows = (2 * end - 1 - first) * kStride + kKernel;
    Word* image = static_cast<Word*>(thread_scratch(0, rows * words * 4));
    StemRows seen(a, taps, n);
    pack_image<P>(seen, columns, top, rows, image);
    const int64_t row = a.w / 2 * a.out_c, panels = (a.out_c + kPanel - 1) / kPanel;
    T* const features = static_cast<T*>(thread_scratch(1, 4 * row * static_cast<int64_t>(sizeof(T))));
    // A kernel row's pixels are the channels of one tap.
    const Shape s{run, run, kKernel, 1, kStride, a.w / 2, a.out_c};
    const auto convolve = [&](int64_t y, int64_t count, T* to) {
        convolve_strip(s, Input<P>{image + (y * kStride - kPad - top) * words, words, pixel, nullptr}, count,
                       0, panels, static_cast<const Word*>(a.weight),
                       static_cast<typename P::Scalar*>(nullptr), epilogue_of(a, to, row));
    };
    if (begin) convolve(first, 1, features + (begin % 2 ? 1 : 3) * row);
    for (int64_t y = begin; y < end; ++y) {
        T* const pair = features + y % 2 * 2 * row;
        convolve(2 * y, 2, pair);
        Window<T> window{{pair, pair + row, features + (y % 2 ? 1 : 3) * row}, y ? 3 : 2};
        T* out = static_cast<T*>(a.out) + (n * out_h + y) * out_w * a.out_c;
        for (int64_t x = 0; x < out_w; ++x) {
            pool_pixel(window, a.out_c, x ? 2 * x - 1 : 0, 2 * x + 2, out + x * a.out_c);
        }
    }
}

template <typename P, typename T>
void run(const Stem& a) {
    const int64_t out_h = a.h / 4, pieces = (out_h + kPooledRows - 1) / kPooledRows;
    const ColumnTaps taps = stem_taps(a, 3);
    parallel_for(a.threads, a.n * pieces, [&](int64_t task) {
        const int64_t begin = task % pieces * kPooledRows;
        run_rows<P, T>(a, taps, task / pieces, begin, std::min(begin + kPooledRows, out_h));
    });
}

}  // namespace

void stem(const Stem& args) {
    if (args.product == Product::int8) return run<Int8, uint8_t>(args);
    const bool wide = args.product == Product::float32;
    with_type<float, bf16, uint8_t>(args.dtype, [&](auto t) {
        wide ? run<Float32, decltype(t)>(args) : run<Bfloat16, decltype(t)>(args);
    });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
