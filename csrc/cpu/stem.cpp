#include <type_traits>

#include "../common/parallel.h"
#include "conv_direct.h"
#include "dtypes.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int64_t kKernel = 7, kStride = 2, kPad = 3;
// Pooled rows of one task: 2 * 8 + 1 rows of the convolution are made for them, one of them twice.
constexpr int64_t kPooledRows = 8;

// Pixels [0, count) of image row y as normalised float32 RGB.
void read_row(const Stem& a, int64_t n, int64_t y, int64_t count, float* to) {
    if (a.image_dtype == DType::u8) {
        const uint8_t* from = static_cast<const uint8_t*>(a.image) + (n * a.image_h + y) * a.image_w * 3;
        for (int64_t x = 0; x < count; ++x) {
            for (int64_t k = 0; k < 3; ++k) to[3 * x + k] = a.values[3 * from[3 * x + k] + k];
        }
        return;
    }
    for (int64_t k = 0; k < 3; ++k) {
        const float* plane = static_cast<const float*>(a.image) + ((n * 3 + k) * a.image_h + y) * a.image_w;
        for (int64_t x = 0; x < count; ++x) to[3 * x + k] = plane[x];
    }
}

// Words of a pixel: three floats, four bfloat16 or four codes, the last of them zero.
template <typename P>
constexpr int64_t kPixelWords = P::kElements == 1 ? 3 : 4 / P::kElements;

// A row of normalised pixels as a product's words.
void read_words(Float32, const Stem& a, int64_t n, int64_t y, int64_t count, Float32::Word* to) {
    read_row(a, n, y, count, to);
}

void read_words(Bfloat16, const Stem& a, int64_t n, int64_t y, int64_t count, Bfloat16::Word* to) {
    const int64_t floats = (3 * count + kLanes - 1) / kLanes * kLanes;
    float* row = static_cast<float*>(thread_scratch(2, floats * 4));
    bf16* narrow = static_cast<bf16*>(thread_scratch(3, (floats + 1) * 2));
    read_row(a, n, y, count, row);
    for (int64_t i = 3 * count; i < floats; ++i) row[i] = 0;
    for (int64_t i = 0; i < floats; i += kLanes) store(narrow + i, load(row + i));
    narrow[floats] = {};  // the last pixel is read with the element after it
    for (int64_t x = 0; x < count; ++x) {
        uint16_t pixel[4];
        std::memcpy(pixel, narrow + 3 * x, sizeof(pixel));
        pixel[3] = 0;
        std::memcpy(to + 2 * x, pixel, sizeof(pixel));
    }
}

// A row of raw pixels.
void read_words(Int8, const Stem& a, int64_t n, int64_t y, int64_t count, Int8::Word* to) {
    if (a.image_dtype == DType::u8) {
        const uint8_t* from = static_cast<const uint8_t*>(a.image) + (n * a.image_h + y) * a.image_w * 3;
        for (int64_t x = 0; x < count; ++x, from += 3) to[x] = from[0] | from[1] << 8 | from[2] << 16;
        return;
    }
    const int64_t row = count + kLanes;
    uint8_t* codes = static_cast<uint8_t*>(thread_scratch(2, 3 * row));
    for (int64_t k = 0; k < 3; ++k) {
        const float* plane = static_cast<const float*>(a.image) + ((n * 3 + k) * a.image_h + y) * a.image_w;
        const vf scale = splat(a.raw[k]), shift = splat(a.raw[3 + k]);
        for (int64_t x = 0; x < count; x += kLanes) {
            const int some = static_cast<int>(count - x < kLanes ? count - x : kLanes);
            store(codes + k * row + x, load_up_to(plane + x, some) * scale + shift);
        }
    }
    for (int64_t x = 0; x < count; ++x) to[x] = codes[x] | codes[row + x] << 8 | codes[2 * row + x] << 16;
}

template <typename Word>
void fill(Word* to, int64_t count, Word value) {
    for (int64_t i = 0; i < count; ++i) to[i] = value;
}

template <typename P>
void pack_image(const Stem& a, const Shape& s, int64_t n, int64_t first_row, int64_t rows,
                typename P::Word* to) {
    constexpr int64_t kWords = kPixelWords<P>;
    const int64_t columns = s.columns();
    const int64_t inside = columns - kPad < a.image_w ? columns - kPad : a.image_w;
    const typename P::Word zero = std::is_same<P, Int8>::value ? a.zero : 0;
    for (int64_t r = 0; r < rows; ++r, to += kWords * columns) {
        const int64_t y = first_row + r;
        if (y < 0 || y >= a.image_h) {
            fill(to, kWords * columns, zero);
            continue;
        }
        fill(to, kWords * kPad, zero);
        read_words(P{}, a, n, y, inside, to + kWords * kPad);
        fill(to + kWords * (kPad + inside), kWords * (columns - kPad - inside), zero);
    }
}

// The greatest of up to 3 x 3 pixels, for all channels of one pooled pixel. rows: [row][column][c].
template <typename T>
void pool_pixel(const float* rows, int64_t row, int64_t c, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                T* out) {
    int64_t k = 0;
    for (; k + kLanes <= c; k += kLanes) {
        vf best = load(rows + y0 * row + x0 * c + k);
        for (int64_t y = y0; y < y1; ++y) {
            for (int64_t x = x0; x < x1; ++x) {
                const vf v = load(rows + y * row + x * c + k);
                best = ((v > best) | (v != v)) ? v : best;  // NaN wins, as in torch
            }
        }
        store(out + k, best);
    }
    for (; k < c; ++k) {
        float best = rows[y0 * row + x0 * c + k];
        for (int64_t y = y0; y < y1; ++y) {
            for (int64_t x = x0; x < x1; ++x) {
                const float v = rows[y * row + x * c + k];
                best = v > best || v != v ? v : best;
            }
        }
        store_one(out + k, best);
    }
}

typedef uint8_t Bytes __attribute__((vector_size(16)));

void pool_pixel(const uint8_t* rows, int64_t row, int64_t c, int64_t y0, int64_t y1, int64_t x0, int64_t x1,
                uint8_t* out) {
    int64_t k = 0;
    for (; k + 16 <= c; k += 16) {
        Bytes best = {};
        for (int64_t y = y0; y < y1; ++y) {
            for (int64_t x = x0; x < x1; ++x) {
                const Bytes v = load_vector<Bytes>(rows + y * row + x * c + k);
                best = v > best ? v : best;
            }
        }
        std::memcpy(out + k, &best, 16);
    }
    for (; k < c; ++k) {
        out[k] = 0;
        for (int64_t y = y0; y < y1; ++y) {
            for (int64_t x = x0; x < x1; ++x) {
                const uint8_t v = rows[y * row + x * c + k];
                out[k] = v > out[k] ? v : out[k];
            }
        }
    }
}

// Of a row of features, `to`: what rounds to a code can be rounded before it is pooled.
Epilogue<float> epilogue_of(const Stem& a, float* to, int64_t row) {
    return {a.scale, a.shift, nullptr, nullptr, to, row, a.out_c, 0, a.slope};
}

CodesEpilogue epilogue_of(const Stem& a, uint8_t* to, int64_t row) {
    CodesEpilogue e = {};
    e.scale = a.scale;
    e.shift = a.shift;
    e.codes = to;
    e.row = row;
    e.pixel = a.out_c;
    e.slope = a.slope;
    e.bias = a.bias;
    return e;
}

template <typename P, typename T>
void run(const Stem& a) {
    using Word = typename P::Word;
    using Feature = typename std::conditional<std::is_same<T, uint8_t>::value, uint8_t, float>::type;
    const int64_t conv_h = a.h / 2, conv_w = a.w / 2, out_h = a.h / 4, out_w = a.w / 4;
    const Shape s{kPixelWords<P>, kPixelWords<P>, kKernel, kKernel, kStride, conv_w, a.out_c};
    const int64_t pieces = (out_h + kPooledRows - 1) / kPooledRows;
    parallel_for(a.threads, a.n * pieces, [&](int64_t task) {
        const int64_t n = task / pieces, begin = task % pieces * kPooledRows;
        const int64_t end = begin + kPooledRows < out_h ? begin + kPooledRows : out_h;
        const int64_t top = begin ? 2 * begin - 1 : 0, bottom = 2 * end < conv_h ? 2 * end : conv_h;
        const int64_t rows = s.input_rows(bottom - top);
        Word* image = static_cast<Word*>(thread_scratch(0, rows * s.columns() * s.c * 4));
        pack_image<P>(a, s, n, top * kStride - kPad, rows, image);
        const int64_t row = conv_w * a.out_c;
        auto* features = static_cast<Feature*>(thread_scratch(1, (bottom - top) * row * sizeof(Feature)));
        const int64_t panels = (a.out_c + kPanel - 1) / kPanel;
        convolve_strip(s, Input<P>{image, 0, 0, nullptr}, bottom - top, 0, panels,
                       static_cast<const Word*>(a.weight), static_cast<typename P::Scalar*>(nullptr),
                       epilogue_of(a, features, row));
        for (int64_t y = begin; y < end; ++y) {
            T* out = static_cast<T*>(a.out) + (n * out_h + y) * out_w * a.out_c;
            const int64_t y0 = (y ? 2 * y - 1 : 0) - top;
            const int64_t y1 = 2 * y + 2 - top;
            for (int64_t x = 0; x < out_w; ++x) {
                pool_pixel(features, row, a.out_c, y0, y1, x ? 2 * x - 1 : 0, 2 * x + 2, out + x * a.out_c);
            }
        }
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
