// The CPU kernels' arguments, and the table through which one instruction set's are called.
//
// Storage is NHWC, contiguous unless strides are given; sizes are trusted: Python checked them.
#pragma once

#include <cstdint>

namespace shelfkern {

enum class DType : int { f32 = 0, bf16 = 1, u8 = 2 };

// What a word of 32 bits holds where it is multiplied: one float32, two bfloat16, four codes of 8 bits, or
// two whole numbers of 16 bits.
enum class Product : int { float32 = 0, bfloat16 = 1, int8 = 2, int16 = 3 };

// skip + gate[n, c] * nearest_x2(x). x: n h w c; skip, out: n 2h 2w c; gate: n c float32 or null.
// Of codes: skip_scale * skip + x_scale * gate * (x - x_zero) + bias.
struct UpsampleAdd {
    const void *x, *skip;
    const float* gate;
    void* out;
    DType dtype;
    int64_t n, h, w, c;
    int threads;
    float x_zero, x_scale, skip_scale, bias;
};

// sigmoid(scale * (weight @ mean_hw(x)) + shift). x: n hw c; weight: k c float32; out: n k float32.
// x may be codes, of step * (code - zero).
struct AttentionGate {
    const void* x;
    const float *weight, *scale, *shift;
    float* out;
    DType dtype;
    int64_t n, hw, c, k;
    int threads;
    float step, zero;
};

// Bilinear resize of scores (n h w c) to full_h x full_w, of which the first out_h x out_w are made.
// upsample_bilinear writes n c out_h out_w in dtype; upsample_argmax n out_h out_w uint8. For
// upsample_bilinear_backward scores is the gradient of the former's result, out that of its scores: n c h w.
struct Resize {
    const void* scores;
    void* out;
    DType dtype;
    int64_t n, h, w, c, full_h, full_w, out_h, out_w;
    bool align_corners;
    int threads;
    bool mirror = false;  // flips the whole result left-right
};

// out += softmax over classes, or exp, of the resize. out: n c out_h out_w float32; strides in elements.
struct SoftmaxSum {
    Resize resize;
    int64_t stride_n, stride_c, stride_h;
    bool exp;
};

// Cross-entropy of the resize, whose size is the target's: n out_h out_w, uint8 or int64. Each pixel's loss
// is (1 - label_smoothing) weight[t] (log-sum-exp - score[t]) + label_smoothing / c times the sum over
// classes of weight (log-sum-exp - score). Pixels of ignore_index have none.
struct UpsampleCrossEntropy {
    Resize resize;  // its out is not used
    const void* target;
    bool wide_target;  // int64
    int64_t ignore_index;
    const float* weight;  // per class; null: 1
    float label_smoothing;
    float* losses;    // n out_h out_w, -1 where ignored; or null
    float* gradient;  // of the sum of losses: n c h w; or null
    // Or null: earlier losses, of which only those above cutoff have a gradient, and a share of those equal.
    const float* kept_of;
    float cutoff, share;
};

struct CrossEntropySums {
    double loss, weight;  // weights of the labels; 0 where ignored
    int64_t unknown;      // index of the first label that is neither a class nor ignored, -1 if all are
};

// The losses that hard example mining keeps: those above the threshold, but the `least` greatest at least.
struct SelectHardest {
    const float* losses;  // -1: ignored
    int64_t count, least;
    float threshold;
    int threads;
};

// Kept are the losses above cutoff, and `share` of each that equals it.
struct Hardest {
    float cutoff, share;
    double loss;  // the kept losses' sum
    int64_t kept;
};

// out = act(scale * conv(x, weight) + shift + residual) + skip.
//
// x: n h w c of dtype. out, residual and skip share strides (in elements), so that a transposed convolution's
// parities can write interleaved pixels. Weights: per panel of 16 output channels and chunk of input
// channels, kernel_h x kernel_w x chunk x 16 words of product (ops/conv_bn_act.py packs them).
//
// Of int8, x, residual and skip are codes, uint8, and out codes or float32:
// act(scale * (conv(x, weight) + start) + shift + residual_scale * residual) + skip_scale * skip + bias.
struct Conv {
    const void *x, *weight;
    const float *scale, *shift;   // per output channel; null: 1 and 0. Of int8 per channel of whole panels
    const void *residual, *skip;  // or null
    void* out;
    DType dtype;
    Product product;
    int64_t n, h, w, c, out_h, out_w, out_c;
    int64_t kernel_h, kernel_w, stride, pad_h, pad_w, chunk;  // chunk: words
    int64_t stride_n, stride_h, stride_w;
    float slope;  // of the activation: 0 relu, 1 none
    int threads;
    const int32_t* start;  // per channel of whole panels: less x_zero times the sum of its weights; or null
    int x_zero;            // the code of 0
    float residual_scale, skip_scale, bias;
    bool to_codes;
};

// The same for 3x3 kernels of padding 1 by Winograd's minimal filtering: of stride 1 with tiles of 2 or 4, of
// stride 2 with tiles of 4, or the transposed convolution of stride 2 and output padding 1 with tiles of 4.
//
// Weights: where chunk is 0, per panel of 16 output channels, (tile + 2)^2 frequencies x c x 16 float32, or
// of int16 c / 2 x 16 words (ops/_conv_winograd.py transforms them); else untransformed, as of Conv in chunks
// of that many words of float32, or of int16 of bfloat16. units, of int16: what 1 is worth, panels x (tile +
// 2)^2 x 16; levels: by what each input channel is multiplied, and its weights are divided.
//
// With x_zero and what follows, of codes to codes as Conv, there is no start: x_zero is taken from x.
struct Winograd {
    const void *x, *weight;
    const float *units, *levels;
    const float *scale, *shift;   // per output channel; null: 1 and 0
    const void *residual, *skip;  // or null
    void* out;
    DType dtype;
    Product product;
    int64_t n, h, w, c, out_h, out_w, out_c;
    int tile, stride;
    bool transposed;
    int64_t chunk;
    int64_t stride_n, stride_h, stride_w;
    float slope;
    int threads;
    int x_zero;
    float residual_scale, skip_scale, bias;
};

// relu(scale2 * conv(hidden) + shift2 + x), plus x if skip, where hidden = act(scale1 * conv(x) + shift1), by
// Winograd's filtering of stride 1 with tiles of 4. x, hidden, out: n h w c, dense; weights transformed, of
// both.
struct WinogradBlock {
    const void *x, *weight;
    const float *units, *levels, *scale1, *shift1, *scale2, *shift2;
    void *hidden, *out;
    DType dtype;
    Product product;
    int64_t n, h, w, c;
    bool skip;
    float slope;
    int threads;
};

// max_pool3x3s2(act(scale * conv7x7s2(image) + shift)) of an image n image_h image_w, after normalisation
// padded with zeros to padded_h x padded_w and enlarged bilinearly to h x w, where these differ. u8 images
// are NHWC, and `values` (256 x 3) holds all that they may hold, normalised; others, float32 or
// bf16, are NCHW and normalised already.
//
// Those of int8 multiply raw images, and of others raw[c] * x + raw[3 + c], rounded; `zero` stands for 0.
// Where the result is codes, `bias` is added before they are rounded; scale and shift are of whole panels.
//
// stem_winograd multiplies float32; its weights are per panel of 16 output channels 7 x 7 frequencies x 12 x
// 16 (ops/_stem_winograd.py transforms them), and it reads neither `product` nor `raw` and `zero`.
struct Stem {
    const void* image;
    const float* values;
    const void* weight;  // as Conv's, the pixels of a kernel row as channels of one tap
    const float *scale, *shift;
    void* out;
    DType image_dtype, dtype;
    Product product;
    int64_t n, image_h, image_w, padded_h, padded_w, h, w, out_c;
    float slope;
    int threads;
    const float* raw;
    uint32_t zero;
    float bias;
};

// codes = x * codes_scale + zero, the nearest, ties to even, within [0, 255]; NaN becomes zero. Then the bits
// of `sign` are turned: 128 makes int8 of codes whose zero is 128.
struct Quantize {
    const void* x;
    uint8_t* codes;
    DType dtype;
    int64_t count;
    float codes_scale, zero;
    uint8_t sign;
    int threads;
};

// out = act((x - mean) / sqrt(var + eps) * weight + bias + residual) * noise; unless they are given, mean and
// var are found: those of each channel over n x hw pixels. x, residual, out: n hw c; noise: n c; the rest: c.
// residual, weight, bias and noise may be null. mask, or null: for each pixel (c + 7) / 8 bytes, whose bits
// say where the activation's argument was positive.
struct BnActDropout {
    const void *x, *residual;
    const float *weight, *bias, *noise;
    void* out;
    float *mean, *var;
    uint8_t* mask;
    DType dtype;
    int64_t n, hw, c;
    float eps, slope;
    bool given;
    int threads;
};

// Its gradients from grad, that of out. grad_residual may be null; null mask: no activation.
struct BnActDropoutBackward {
    const void *grad, *x;
    const float *weight, *mean, *var, *noise;
    const uint8_t* mask;
    void *grad_x, *grad_residual;
    float *grad_weight, *grad_bias;
    DType dtype;
    int64_t n, hw, c;
    float eps, slope;
    int threads;
};

// out = max over windows of 3x3, stride 2 and padding 1, and of each result its tap in the window, 0 to 8: of
// equal ones the first, of NaN the last. x: n h w c; out, taps: n (h + 1) / 2 (w + 1) / 2 c.
struct MaxPool {
    const void* x;
    void* out;
    uint8_t* taps;
    DType dtype;
    int64_t n, h, w, c;
    int threads;
};

// Its gradient from grad, that of out.
struct MaxPoolBackward {
    const void* grad;
    const uint8_t* taps;
    void* grad_x;
    DType dtype;
    int64_t n, h, w, c;
    int threads;
};

// Operations a second of products alone, on as many threads.
struct Peak {
    Product product;
    int threads;
    int64_t milliseconds;
};

struct Kernels {
    const char* isa;
    bool has[4];  // whether there are instructions for each product
    void (*upsample_add)(const UpsampleAdd&);
    void (*attention_gate)(const AttentionGate&);
    void (*upsample_bilinear)(const Resize&);
    void (*upsample_bilinear_backward)(const Resize&);
    void (*upsample_argmax)(const Resize&);
    void (*upsample_softmax_sum)(const SoftmaxSum&);
    CrossEntropySums (*upsample_cross_entropy)(const UpsampleCrossEntropy&);
    Hardest (*select_hardest)(const SelectHardest&);
    void (*conv_bn_act)(const Conv&);
    void (*stem)(const Stem&);
    void (*stem_winograd)(const Stem&);
    void (*winograd)(const Winograd&);
    void (*winograd_block)(const WinogradBlock&);
    void (*quantize)(const Quantize&);
    void (*bn_act_dropout)(const BnActDropout&);
    void (*bn_act_dropout_backward)(const BnActDropoutBackward&);
    void (*max_pool)(const MaxPool&);
    void (*max_pool_backward)(const MaxPoolBackward&);
    double (*peak)(const Peak&);
};

// The best table that this CPU can run, or the one that `force_isa` chose.
const Kernels& kernels();

// Chooses by name; false if it was not compiled or this CPU cannot run it.
bool force_isa(const char* isa);

// Names of the compiled tables that this CPU can run, best first, ended by null.
const char* const* runnable_isas();

}  // namespace shelfkern
