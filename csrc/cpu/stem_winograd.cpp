// stem by Winograd's minimal filtering, in float32.
//
// The 7x7 convolution of stride 2 is a 4x4 convolution of stride 1 over quads: 2 x 2 pixels of three colours,
// as twelve channels. With tiles of 4 x 4 outputs it takes 7 x 7 products per channel, a quarter of the
// direct convolution's. Tiles are pooled in registers as they are computed.
#include <algorithm>
#include <cstring>
#include <limits>

#include "../common/parallel.h"
#include "dtypes.h"
#include "partial.h"
#include "stem_rows.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

constexpr int kTile = 4, kWindow = 7, kFrequencies = kWindow * kWindow;
// Colours in one row of a quad's two pixels, in both rows; and floats per quad, padded.
constexpr int kRowColours = 6, kColours = 2 * kRowColours, kQuad = 16;
// Output channels in a weight panel.
constexpr int kPanel = 16;
// Tiles that are multiplied at once, each in one register.
constexpr int kTiles = 6;
// Rows of quads that are kept: a window's and one more, for indexing by a mask.
constexpr int kRing = 8;
// Minimum rows of tiles per task, because the row before the first is computed as well.
constexpr int64_t kLeastRows = 4;
// Lowest value, below everything that is pooled.
constexpr float kLowest = std::numeric_limits<float>::lowest();

// B^T for the points 0, 1, -1, 2, -2, 1/2 and infinity.
inline __attribute__((always_inline)) void transform_input(const vf (&d)[kWindow], vf (&t)[kWindow]) {
    vf e[kWindow - 1];  // times x - 1/2, the common factor of all rows but its own
    for (int i = 0; i < kWindow - 1; ++i) e[i] = d[i + 1] - splat(0.5f) * d[i];
    const vf u = e[3] - splat(4) * e[1], v = e[4] - splat(4) * e[2];
    const vf p = e[3] - e[1], q = e[4] - e[2];
    t[0] = e[4] - splat(5) * e[2] + splat(4) * e[0];
    t[1] = v + u;
    t[2] = v - u;
    t[3] = q + splat(2) * p;
    t[4] = q - splat(2) * p;
    t[5] = d[5] - splat(5) * d[3] + splat(4) * d[1];
    t[6] = e[5] - splat(5) * e[3] + splat(4) * e[1];
}

// A^T for the same points.
inline __attribute__((always_inline)) void transform_output(const vf (&m)[kWindow], vf (&y)[kTile]) {
    const vf sum1 = m[1] + m[2], difference1 = m[1] - m[2];
    const vf sum2 = m[3] + m[4], difference2 = m[3] - m[4];
    y[0] = m[0] + sum1 + sum2 + m[5];
    y[1] = difference1 + splat(2) * difference2 + splat(0.5f) * m[5];
    y[2] = sum1 + splat(4) * sum2 + splat(0.25f) * m[5];
    y[3] = difference1 + splat(8) * difference2 + splat(0.125f) * m[5] + m[6];
}

// The maximum; the last argument if one of them is NaN.
inline vf greatest(vf a, vf b, vf c) {
    const vf ab = a > b ? a : b;
    return ab > c ? ab : c;
}

template <typename T>
class Rows {
   public:
    // Uses scratch slots 0 and 2, and those of StemRows.
    Rows(const Stem& a, const ColumnTaps& taps, int64_t n)
        : a_(a),
          image_(a, taps, n),
          n_(n),
          out_h_(a.h / 4),
          out_w_(a.w / 4),
          tiles_((a.w / 2 + kTile - 1) / kTile),
          vectors_((a.out_c + kLanes - 1) / kLanes),
          row_floats_((kTile * tiles_ + kWindow - kTile) * kQuad) {
        constexpr int64_t kChunk = kTile * kTiles + kWindow - kTile;
        const int64_t sizes[] = {kRing * row_floats_,           kWindow * kChunk * kQuad,
                                 kFrequencies * kTiles * kQuad, kFrequencies * kTiles * kLanes,
                                 vectors_ * kTile * kLanes,     out_w_ * vectors_ * kLanes};
        float** const parts[] = {&quads_, &columns_, &inputs_, &products_, &left_, &above_};
        int64_t floats = 0;
        for (int64_t size : sizes) floats += (size + 15) / 16 * 16;
        float* memory = static_cast<float*>(thread_scratch(0, floats * 4));
        std::fill(memory, memory + floats, 0.f);
        for (int i = 0; i < 6; ++i) {
            *parts[i] = memory;
            memory += (sizes[i] + 15) / 16 * 16;
        }
        std::fill(above_, above_ + sizes[5], kLowest);
        line_ = static_cast<float*>(thread_scratch(2, (3 * a.w + kLanes) * 4));
    }

    // Computes rows [begin, end) of tiles, each two rows of pooled pixels.
    void run(int64_t begin, int64_t end) {
        const int64_t first = begin ? begin - 1 : 0;
        for (int64_t m = kTile * first - 2; m < kTile * first + 1; ++m) read_quads(m);
        for (int64_t j = first; j < end; ++j) {
            for (int64_t m = kTile * j + 1; m < kTile * j + 5; ++m) read_quads(m);
            for (int64_t x = 0; x < tiles_; x += kTiles) {
                const int64_t count = std::min<int64_t>(tiles_ - x, kTiles);
                transform(j, x, count);
                for (int64_t v = 0; v < vectors_; ++v) {
                    multiply(v);
                    finish(v, j, x, count, j >= begin);
                }
            }
        }
    }

   private:
    const Stem& a_;
    StemRows image_;
    const int64_t n_, out_h_, out_w_, tiles_, vectors_, row_floats_;
    // A ring of quad rows; and for some tiles the windows with transformed columns, the transformed windows,
    // and their products.
    float *quads_, *columns_, *inputs_, *products_;
    // The last outputs of the tiles to the left, and the pooled last row of the tiles above.
    float *left_, *above_;
    float* line_;

    float* quads(int64_t m) const { return quads_ + (m & (kRing - 1)) * row_floats_; }

    // Reads quad row m, after two rows of zeros.
    void read_quads(int64_t m) {
        for (int64_t i = 0; i < 2; ++i) {
            const int64_t y = 2 * m + i;
            float* to = quads(m) + 2 * kQuad + i * kRowColours;
            if (y < 0 || y >= image_.rows) {
                for (int64_t x = 0; x < a_.w / 2; ++x) std::fill_n(to + x * kQuad, kRowColours, 0.f);
                continue;
            }
            image_.read(y, image_.columns, line_);
            std::fill(line_ + 3 * image_.columns, line_ + 3 * a_.w, 0.f);
            for (int64_t x = 0; x < a_.w / 2; ++x) {
                std::memcpy(to + x * kQuad, line_ + x * kRowColours, kRowColours * sizeof(float));
            }
        }
    }

    // Transforms the windows of `count` tiles from x in row j.
    void transform(int64_t j, int64_t x, int64_t count) {
        const int64_t columns = kTile * count + kWindow - kTile, stride = columns * kQuad;
        vf d[kWindow], t[kWindow];
        for (int64_t c = 0; c < stride; c += kQuad) {
            for (int64_t k = c; k < c + kColours; k += kLanes) {
                for (int i = 0; i < kWindow; ++i)
                    d[i] = load(quads(kTile * j - 2 + i) + kTile * x * kQuad + k);
                transform_input(d, t);
                for (int i = 0; i < kWindow; ++i) store(columns_ + i * stride + k, t[i]);
            }
        }
        for (int64_t tile = 0; tile < count; ++tile) {
            for (int i = 0; i < kWindow; ++i) {
                const float* from = columns_ + i * stride + kTile * tile * kQuad;
                float* to = inputs_ + (i * kWindow * kTiles + tile) * kQuad;
                for (int64_t k = 0; k < kColours; k += kLanes) {
                    for (int c = 0; c < kWindow; ++c) d[c] = load(from + c * kQuad + k);
                    transform_input(d, t);
                    for (int c = 0; c < kWindow; ++c) store(to + c * kTiles * kQuad + k, t[c]);
                }
            }
        }
    }

    // Multiplies the tiles' frequencies for vector v of output channels.
    void multiply(int64_t v) {
        const int64_t channel = v * kLanes;
        const float* weight = static_cast<const float*>(a_.weight) +
                              channel / kPanel * kFrequencies * kColours * kPanel + channel % kPanel;
        const float* input = inputs_;
        float* product = products_;
        for (int f = 0; f < kFrequencies; ++f) {
            vf sum[kTiles] = {};
            for (int k = 0; k < kColours; ++k, weight += kPanel) {
                const vf w = load(weight);
#pragma GCC unroll 6
                for (int tile = 0; tile < kTiles; ++tile) sum[tile] += w * splat(input[tile * kQuad + k]);
            }
            for (int tile = 0; tile < kTiles; ++tile) store(product + tile * kLanes, sum[tile]);
            input += kTiles * kQuad;
            product += kTiles * kLanes;
        }
    }

    // Pools the outputs; those of row j are written if `written`.
    void finish(int64_t v, int64_t j, int64_t x, int64_t count, bool written) {
        const int64_t channel = v * kLanes;
        const int some = static_cast<int>(std::min<int64_t>(a_.out_c - channel, kLanes));
        const vf scale = load_up_to(a_.scale + channel, some), shift = load_up_to(a_.shift + channel, some);
        const vf zero = {};
        vf left[kTile];
        float* const kept = left_ + v * kTile * kLanes;
        for (int r = 0; r < kTile; ++r) left[r] = x ? load(kept + r * kLanes) : splat(kLowest);
        T* const out = static_cast<T*>(a_.out) + (n_ * out_h_ + 2 * j) * out_w_ * a_.out_c + channel;
        const auto put = [&](int64_t at, vf value) {
            store_up_to(out + at * a_.out_c, activate(value, a_.slope) + splat(a_.bias), some);
        };
        for (int64_t tile = 0; tile < count; ++tile) {
            vf y[kTile][kTile], pooled[kTile][2], all = zero;
            outputs(products_ + tile * kLanes, y);
            for (auto& row : y) {
                for (vf& value : row) {
                    value = value * scale + shift;
                    all += value;
                }
            }
            // 0, or NaN where outputs or their sum are not finite, which a maximum could lose.
            all *= zero;
            const vf spoiled[2] = {all + left[0] * zero, all};
            for (int r = 0; r < kTile; ++r) {
                pooled[r][0] = greatest(y[r][0], y[r][1], left[r]);
                pooled[r][1] = greatest(y[r][1], y[r][2], y[r][3]);
                left[r] = y[r][3] + all;
            }
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t at = 2 * (x + tile) + i;
                if (at == out_w_) break;
                float* const above = above_ + (at * vectors_ + v) * kLanes;
                const vf top = greatest(pooled[0][i], pooled[1][i], load(above)) + spoiled[i];
                const vf bottom = greatest(pooled[1][i], pooled[2][i], pooled[3][i]) + spoiled[i];
                store(above, pooled[3][i] + spoiled[i]);
                if (!written) continue;
                put(at, top);
                if (2 * j + 1 < out_h_) put(out_w_ + at, bottom);
            }
        }
        for (int r = 0; r < kTile; ++r) store(kept + r * kLanes, left[r]);
    }

    // The outputs of a tile from its frequencies.
    static inline __attribute__((always_inline)) void outputs(const float* products, vf (&y)[kTile][kTile]) {
        vf rows[kTile][kWindow], m[kWindow], of_column[kTile];
        for (int c = 0; c < kWindow; ++c) {
            for (int i = 0; i < kWindow; ++i) m[i] = load(products + (i * kWindow + c) * kTiles * kLanes);
            transform_output(m, of_column);
            for (int r = 0; r < kTile; ++r) rows[r][c] = of_column[r];
        }
        for (int r = 0; r < kTile; ++r) transform_output(rows[r], y[r]);
    }
};

template <typename T>
void run(const Stem& a) {
    const int64_t rows = (a.h / 2 + kTile - 1) / kTile;
    // The grid of tiles depends only on the image, not on the tasks, and so do the roundings.
    const int64_t most = a.threads > 1 ? std::min<int64_t>(2 * a.threads, rows / kLeastRows) : 1;
    const int64_t pieces = std::max<int64_t>(most, 1);
    const ColumnTaps taps = stem_taps(a, 3);
    parallel_for(a.threads, a.n * pieces, [&](int64_t task) {
        const int64_t piece = task % pieces;
        Rows<T>(a, taps, task / pieces).run(rows * piece / pieces, rows * (piece + 1) / pieces);
    });
}

}  // namespace

void stem_winograd(const Stem& args) {
    with_type<float, bf16, uint8_t>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
