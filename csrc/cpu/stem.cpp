#include "../common/parallel.h"
#include "conv_direct.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int64_t kKernel = 7, kStride = 2, kPad = 3, kImageChannels = 3;
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

void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

void pack_image(const Stem& a, const Shape& s, int64_t n, int64_t first_row, int64_t rows, float* to) {
    const int64_t columns = s.columns();
    const int64_t inside = columns - kPad < a.image_w ? columns - kPad : a.image_w;
    for (int64_t r = 0; r < rows; ++r, to += 3 * columns) {
        const int64_t y = first_row + r;
        if (y < 0 || y >= a.image_h) {
            clear(to, 3 * columns);
            continue;
        }
        clear(to, 3 * kPad);
        read_row(a, n, y, inside, to + 3 * kPad);
        clear(to + 3 * (kPad + inside), 3 * (columns - kPad - inside));
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

template <typename T>
void run(const Stem& a) {
    const int64_t conv_h = a.h / 2, conv_w = a.w / 2, out_h = a.h / 4, out_w = a.w / 4;
    const Shape s{kImageChannels, kImageChannels, kKernel, kKernel, kStride, conv_w, a.out_c};
    const int64_t pieces = (out_h + kPooledRows - 1) / kPooledRows;
    parallel_for(a.threads, a.n * pieces, [&](int64_t task) {
        const int64_t n = task / pieces, begin = task % pieces * kPooledRows;
        const int64_t end = begin + kPooledRows < out_h ? begin + kPooledRows : out_h;
        const int64_t top = begin ? 2 * begin - 1 : 0, bottom = 2 * end < conv_h ? 2 * end : conv_h;
        const int64_t rows = s.input_rows(bottom - top);
        float* image = static_cast<float*>(thread_scratch(0, rows * s.columns() * 3 * 4));
        pack_image(a, s, n, top * kStride - kPad, rows, image);
        float* features = static_cast<float*>(thread_scratch(1, (bottom - top) * conv_w * a.out_c * 4));
        Output<float> o{features, nullptr, nullptr, a.scale, a.shift, conv_w * a.out_c, a.out_c, a.slope};
        const int64_t panels = (a.out_c + kPanel - 1) / kPanel;
        convolve_strip(s, Input<Floats>{image, 0, 0}, bottom - top, 0, panels, a.weight, nullptr, o);
        for (int64_t y = begin; y < end; ++y) {
            T* out = static_cast<T*>(a.out) + (n * out_h + y) * out_w * a.out_c;
            const int64_t y0 = (y ? 2 * y - 1 : 0) - top;
            const int64_t y1 = 2 * y + 2 - top;
            for (int64_t x = 0; x < out_w; ++x) {
                pool_pixel(features, conv_w * a.out_c, a.out_c, y0, y1, x ? 2 * x - 1 : 0, 2 * x + 2,
                           out + x * a.out_c);
            }
        }
    });
}

}  // namespace

void stem(const Stem& args) {
    if (args.dtype == DType::f32) {
        run<float>(args);
    } else {
        run<bf16>(args);
    }
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
