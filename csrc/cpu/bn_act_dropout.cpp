#include "../common/parallel.h"
#include "dtypes.h"

// sqrt from libm: the standard library's templates must not be instantiated here.
#include <math.h>

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Pixels per task, summed in float32, which still fit in L2 when they are read again. The size is fixed, and
// the pieces are added in order in float64, so that the result does not depend on the number of threads.
constexpr int64_t kPiece = 64;
// Pixels that are summed in registers before they are added to their piece's sum in memory.
constexpr int64_t kRun = 8;
// Channels that are summed together: four cache lines of a pixel.
constexpr int64_t kBlock = 64;
// Channels whose mask bits are stored together.
constexpr int kGroup = 16;

// The n x hw pixels in pieces, none of which spans two images.
struct Pieces {
    int64_t hw, an_image, count;

    Pieces(int64_t n, int64_t hw) : hw(hw), an_image((hw + kPiece - 1) / kPiece), count(n * an_image) {}

    int64_t image(int64_t piece) const { return piece / an_image; }
    int64_t first(int64_t piece) const { return image(piece) * hw + piece % an_image * kPiece; }
    int64_t pixels(int64_t piece) const {
        const int64_t left = hw - piece % an_image * kPiece;
        return left < kPiece ? left : kPiece;
    }
};

// One bit per lane of 16 lanes that are all ones or zero, the first lane lowest.
inline uint32_t bits_of(const vi* masks) {
    uint8_t bytes[kGroup];
    for (int l = 0; l < kGroup / kLanes; ++l) {
        const vb ones = __builtin_convertvector(masks[l] & 1, vb);
        std::memcpy(bytes + l * kLanes, &ones, sizeof(ones));
    }
    uint64_t halves[2];
    std::memcpy(halves, bytes, sizeof(halves));
    // The product's highest byte collects the lowest bits of eight bytes.
    constexpr uint64_t kGather = 0x0102040810204080;
    return static_cast<uint32_t>(halves[0] * kGather >> 56 | halves[1] * kGather >> 56 << 8);
}

inline void store_bits(uint8_t* p, uint32_t bits) {
    p[0] = static_cast<uint8_t>(bits);
    p[1] = static_cast<uint8_t>(bits >> 8);
}

inline uint32_t load_bits(const uint8_t* p) { return p[0] | static_cast<uint32_t>(p[1]) << 8; }

// 1 where the lane's bit is set, otherwise the slope.
inline vf factors(uint32_t bits, vu lane_bits, float slope) {
    return (splat_word(bits) & lane_bits) != 0 ? splat(1) : splat(slope);
}

inline vu lane_bits() {
    vu bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = 1u << i;
    return bits;
}

// Adds body(value of a pixel, channel) over some pixels to sums, for channels [i, i + V vectors).
template <int V, typename T, typename Body>
inline void add_block(const T* x, int64_t pixels, int64_t c, int64_t i, float* sums, const Body& body) {
    vf sum[V] = {};
    for (int64_t p = 0; p < pixels; ++p) {
        for (int v = 0; v < V; ++v) sum[v] += body(load(x + p * c + i + v * kLanes), i + v * kLanes);
    }
    for (int v = 0; v < V; ++v) store(sums + i + v * kLanes, load(sums + i + v * kLanes) + sum[v]);
}

// As above for all channels: kRun pixels at a time, because a sum in memory waits for the previous store, and
// blocked sums are rounded less often.
template <typename T, typename Body>
inline void add_over_pixels(const T* x, int64_t pixels, int64_t c, float* sums, const Body& body) {
    for (int64_t done = 0; done < pixels; done += kRun, x += kRun * c) {
        const int64_t run = pixels - done < kRun ? pixels - done : kRun;
        int64_t i = 0;
        for (; i + kBlock <= c; i += kBlock) add_block<kBlock / kLanes>(x, run, c, i, sums, body);
        for (; i + kLanes <= c; i += kLanes) add_block<1>(x, run, c, i, sums, body);
        for (; i < c; ++i) {
            float sum = 0;
            for (int64_t p = 0; p < run; ++p) sum += body(load_one(x + p * c + i), i);
            sums[i] += sum;
        }
    }
}

struct Value {
    vf operator()(vf v, int64_t) const { return v; }
    float operator()(float v, int64_t) const { return v; }
};

struct SquaredDistance {
    const float* mean;

    vf operator()(vf v, int64_t i) const { return (v - load(mean + i)) * (v - load(mean + i)); }
    float operator()(float v, int64_t i) const { return (v - mean[i]) * (v - mean[i]); }
};

// Mean of a piece, and the sum of squared deviations from it.
template <typename T>
void moments_of_piece(const T* x, int64_t pixels, int64_t c, float* mean, float* squares) {
    for (int64_t i = 0; i < c; ++i) mean[i] = squares[i] = 0;
    add_over_pixels(x, pixels, c, mean, Value());
    const float share = 1 / static_cast<float>(pixels);
    for (int64_t i = 0; i < c; ++i) mean[i] *= share;
    add_over_pixels(x, pixels, c, squares, SquaredDistance{mean});
}

// Merges the pieces' moments into those of all pixels, for channels [from, to).
void merge_moments(const Pieces& pieces, const float* means, const float* squares, int64_t c, int64_t from,
                   int64_t to, float* mean, float* var) {
    double total[kBlock] = {}, square[kBlock] = {};
    const double count = static_cast<double>(pieces.count / pieces.an_image * pieces.hw);
    for (int64_t k = 0; k < pieces.count; ++k) {
        const double pixels = static_cast<double>(pieces.pixels(k));
        for (int64_t i = from; i < to; ++i) total[i - from] += pixels * means[k * c + i];
    }
    for (int64_t i = 0; i < to - from; ++i) total[i] /= count;
    for (int64_t k = 0; k < pieces.count; ++k) {
        const double pixels = static_cast<double>(pieces.pixels(k));
        for (int64_t i = from; i < to; ++i) {
            const double apart = means[k * c + i] - total[i - from];
            square[i - from] += squares[k * c + i] + pixels * apart * apart;
        }
    }
    for (int64_t i = from; i < to; ++i) {
        mean[i] = static_cast<float>(total[i - from]);
        var[i] = static_cast<float>(square[i - from] / count);
    }
}

template <typename T>
void find_moments(const BnActDropout& a, const Pieces& pieces, float* means) {
    float* squares = means + pieces.count * a.c;
    parallel_for(a.threads, pieces.count, [&](int64_t piece) {
        moments_of_piece(static_cast<const T*>(a.x) + pieces.first(piece) * a.c, pieces.pixels(piece), a.c,
                         means + piece * a.c, squares + piece * a.c);
    });
    parallel_for(a.threads, (a.c + kBlock - 1) / kBlock, [&](int64_t block) {
        const int64_t from = block * kBlock, to = a.c - from < kBlock ? a.c : from + kBlock;
        merge_moments(pieces, means, squares, a.c, from, to, a.mean, a.var);
    });
}

// Parameters of one image's pixels, by value: values reached through memory would be reloaded after every
// store.
template <typename T>
struct Apply {
    const T *x, *residual;
    T* out;
    uint8_t* mask;
    const float *mean, *scale, *shift, *noise;
    int64_t c, row_bytes;
    float slope;

    Apply(const BnActDropout& a, int64_t image, const float* scale, const float* shift)
        : x(static_cast<const T*>(a.x)),
          residual(static_cast<const T*>(a.residual)),
          out(static_cast<T*>(a.out)),
          mask(a.mask),
          mean(a.mean),
          scale(scale),
          shift(shift),
          noise(a.noise ? a.noise + image * a.c : nullptr),
          c(a.c),
          row_bytes((a.c + 7) / 8),
          slope(a.slope) {}

    // kGroup channels from i.
    void vectors(int64_t pixel, int64_t i) const {
        vi positive[kGroup / kLanes];
        for (int l = 0; l < kGroup / kLanes; ++l) {
            const int64_t k = i + l * kLanes, at = pixel * c + k;
            vf v = (load(x + at) - load(mean + k)) * load(scale + k) + load(shift + k);
            if (residual) v += load(residual + at);
            positive[l] = v > vf{};
            v = activate(v, slope);
            store(out + at, noise ? v * load(noise + k) : v);
        }
        if (mask) store_bits(mask + pixel * row_bytes + i / 8, bits_of(positive));
    }

    // Fewer than kGroup channels, the last from i.
    void tail(int64_t pixel, int64_t i) const {
        uint32_t bits = 0;
        for (int64_t k = i; k < c; ++k) {
            const int64_t at = pixel * c + k;
            float v = (load_one(x + at) - mean[k]) * scale[k] + shift[k];
            if (residual) v += load_one(residual + at);
            bits |= static_cast<uint32_t>(v > 0) << (k - i);
            v = activate(v, slope);
            store_one(out + at, noise ? v * noise[k] : v);
        }
        if (!mask) return;
        for (; i < c; i += 8, bits >>= 8) mask[pixel * row_bytes + i / 8] = static_cast<uint8_t>(bits);
    }
};

template <typename T>
void apply_to_pixels(const Apply<T> apply, int64_t first, int64_t pixels) {
    const int64_t whole = apply.c / kGroup * kGroup;
    for (int64_t p = first; p < first + pixels; ++p) {
        for (int64_t i = 0; i < whole; i += kGroup) apply.vectors(p, i);
        if (whole < apply.c) apply.tail(p, whole);
    }
}

template <typename T>
void forward(const BnActDropout& a) {
    const Pieces pieces(a.n, a.hw);
    float* scratch = static_cast<float*>(thread_scratch(0, (2 * pieces.count + 2) * a.c * 4));
    if (!a.given) find_moments<T>(a, pieces, scratch + 2 * a.c);
    float *scale = scratch, *shift = scratch + a.c;
    for (int64_t i = 0; i < a.c; ++i) {
        scale[i] = (a.weight ? a.weight[i] : 1) / sqrtf(a.var[i] + a.eps);
        shift[i] = a.bias ? a.bias[i] : 0;
    }
    parallel_for(a.threads, pieces.count, [&](int64_t piece) {
        const Apply<T> apply(a, pieces.image(piece), scale, shift);
        apply_to_pixels(apply, pieces.first(piece), pieces.pixels(piece));
    });
}

// The gradient of the activation's argument, and x - mean, for pixels of one image; by value like Apply.
template <typename T>
struct Gradient {
    const T *grad, *x;
    const uint8_t* mask;
    const float *mean, *noise;
    int64_t c, row_bytes;
    float slope;
    vu lanes;

    Gradient(const BnActDropoutBackward& a, int64_t image)
        : grad(static_cast<const T*>(a.grad)),
          x(static_cast<const T*>(a.x)),
          mask(a.mask),
          mean(a.mean),
          noise(a.noise ? a.noise + image * a.c : nullptr),
          c(a.c),
          row_bytes((a.c + 7) / 8),
          slope(a.slope),
          lanes(lane_bits()) {}

    // kGroup channels from i.
    void vectors(int64_t pixel, int64_t i, vf* g, vf* apart) const {
        uint32_t bits = mask ? load_bits(mask + pixel * row_bytes + i / 8) : 0;
        for (int l = 0; l < kGroup / kLanes; ++l, i += kLanes, bits >>= kLanes) {
            g[l] = load(grad + pixel * c + i);
            if (noise) g[l] *= load(noise + i);
            if (mask) g[l] *= factors(bits, lanes, slope);
            apart[l] = load(x + pixel * c + i) - load(mean + i);
        }
    }

    // Channel i alone.
    void one(int64_t pixel, int64_t i, float* g, float* apart) const {
        *g = load_one(grad + pixel * c + i);
        if (noise) *g *= noise[i];
        if (mask) *g *= mask[pixel * row_bytes + i / 8] >> i % 8 & 1 ? 1 : slope;
        *apart = load_one(x + pixel * c + i) - mean[i];
    }
};

// Adds the gradient of the activation's argument to sums, and its products with x - mean to products: for
// pixels from first and G groups of channels from i.
template <int G, typename T>
inline void add_gradient_block(const Gradient<T>& gradient, int64_t first, int64_t pixels, int64_t i,
                               float* sums, float* products) {
    constexpr int kVectors = kGroup / kLanes;
    vf sum[G * kVectors] = {}, product[G * kVectors] = {};
    for (int64_t p = first; p < first + pixels; ++p) {
        for (int group = 0; group < G; ++group) {
            vf g[kVectors], apart[kVectors];
            gradient.vectors(p, i + group * kGroup, g, apart);
            for (int l = 0; l < kVectors; ++l) {
                sum[group * kVectors + l] += g[l];
                product[group * kVectors + l] += g[l] * apart[l];
            }
        }
    }
    for (int l = 0; l < G * kVectors; ++l) {
        float *to = sums + i + l * kLanes, *also = products + i + l * kLanes;
        store(to, load(to) + sum[l]);
        store(also, load(also) + product[l]);
    }
}

// As above for all channels.
template <typename T>
void add_gradients(const Gradient<T> gradient, int64_t first, int64_t pixels, float* sums, float* products) {
    int64_t i = 0;
    for (; i + kBlock <= gradient.c; i += kBlock) {
        add_gradient_block<kBlock / kGroup>(gradient, first, pixels, i, sums, products);
    }
    for (; i + kGroup <= gradient.c; i += kGroup) {
        add_gradient_block<1>(gradient, first, pixels, i, sums, products);
    }
    for (; i < gradient.c; ++i) {
        float sum = 0, product = 0, g, apart;
        for (int64_t p = first; p < first + pixels; ++p) {
            gradient.one(p, i, &g, &apart);
            sum += g;
            product += g * apart;
        }
        sums[i] += sum;
        products[i] += product;
    }
}

// grad_x = scale * g + shift + slope * (x - mean), and grad_residual = g, for pixels from first.
template <typename T>
void write_gradients(const Gradient<T> gradient, int64_t first, int64_t pixels, const float* scale,
                     const float* shift, const float* slope, T* grad_x, T* grad_residual) {
    constexpr int kVectors = kGroup / kLanes;
    const int64_t c = gradient.c;
    for (int64_t p = first; p < first + pixels; ++p) {
        int64_t i = 0;
        for (; i + kGroup <= c; i += kGroup) {
            vf g[kVectors], apart[kVectors];
            gradient.vectors(p, i, g, apart);
            for (int l = 0; l < kVectors; ++l) {
                const int64_t k = i + l * kLanes;
                const vf moved = load(shift + k) + load(slope + k) * apart[l];
                store(grad_x + p * c + k, load(scale + k) * g[l] + moved);
                if (grad_residual) store(grad_residual + p * c + k, g[l]);
            }
        }
        for (; i < c; ++i) {
            float g, apart;
            gradient.one(p, i, &g, &apart);
            store_one(grad_x + p * c + i, scale[i] * g + (shift[i] + slope[i] * apart));
            if (grad_residual) store_one(grad_residual + p * c + i, g);
        }
    }
}

// Gradients of bias and weight: sums of the gradient of the activation's argument, and of its products with x
// - mean, divided by the standard deviation.
template <typename T>
void find_sums(const BnActDropoutBackward& a, const Pieces& pieces, float* scratch) {
    parallel_for(a.threads, pieces.count, [&](int64_t piece) {
        float *sums = scratch + 2 * piece * a.c, *products = sums + a.c;
        for (int64_t i = 0; i < 2 * a.c; ++i) sums[i] = 0;
        const Gradient<T> gradient(a, pieces.image(piece));
        const int64_t first = pieces.first(piece), pixels = pieces.pixels(piece);
        for (int64_t done = 0; done < pixels; done += kRun) {
            const int64_t run = pixels - done < kRun ? pixels - done : kRun;
            add_gradients(gradient, first + done, run, sums, products);
        }
    });
    parallel_for(a.threads, (a.c + kBlock - 1) / kBlock, [&](int64_t block) {
        const int64_t from = block * kBlock, to = a.c - from < kBlock ? a.c : from + kBlock;
        double sums[kBlock] = {}, products[kBlock] = {};
        for (int64_t k = 0; k < pieces.count; ++k) {
            const float *sum = scratch + 2 * k * a.c, *product = sum + a.c;
            for (int64_t i = from; i < to; ++i) sums[i - from] += sum[i];
            for (int64_t i = from; i < to; ++i) products[i - from] += product[i];
        }
        for (int64_t i = from; i < to; ++i) {
            a.grad_bias[i] = static_cast<float>(sums[i - from]);
            a.grad_weight[i] = static_cast<float>(products[i - from] / sqrt(a.var[i] + double(a.eps)));
        }
    });
}

template <typename T>
void backward(const BnActDropoutBackward& a) {
    const Pieces pieces(a.n, a.hw);
    float* scratch = static_cast<float*>(thread_scratch(0, (2 * pieces.count + 3) * a.c * 4));
    find_sums<T>(a, pieces, scratch + 3 * a.c);
    // scale * (g - mean of g - normalised x * mean of their product), as a linear function of g and x - mean.
    float *scale = scratch, *shift = scale + a.c, *slope = shift + a.c;
    const float count = static_cast<float>(a.n * a.hw);
    for (int64_t i = 0; i < a.c; ++i) {
        const float inverse = 1 / sqrtf(a.var[i] + a.eps);
        scale[i] = (a.weight ? a.weight[i] : 1) * inverse;
        shift[i] = -scale[i] * a.grad_bias[i] / count;
        slope[i] = -scale[i] * inverse * a.grad_weight[i] / count;
    }
    parallel_for(a.threads, pieces.count, [&](int64_t piece) {
        write_gradients(Gradient<T>(a, pieces.image(piece)), pieces.first(piece), pieces.pixels(piece), scale,
                        shift, slope, static_cast<T*>(a.grad_x), static_cast<T*>(a.grad_residual));
    });
}

}  // namespace

void bn_act_dropout(const BnActDropout& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) { forward<decltype(t)>(args); });
}

void bn_act_dropout_backward(const BnActDropoutBackward& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
