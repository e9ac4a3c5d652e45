// The CPU kernels' arguments, and the table of one instruction set's kernels.
//
// Storage is NHWC, contiguous unless strides are given; sizes are not checked: Python has checked them.
#pragma once

#include <cstdint>

namespace shelfkern {

enum class DType : int { f32 = 0, bf16 = 1, u8 = 2 };

// Contents of a 32-bit word in a product: one float32, two bfloat16, four 8-bit or two 16-bit integers.
enum class Product : int { float32 = 0, bfloat16 = 1, int8 = 2, int16 = 3 };

// skip + gate[n, c] * nearest_x2(x). x: n h w c; skip, out: n 2h 2w c; gate: n c float32 or null.
// For uint8: skip_scale * skip + x_scale * gate * (x - x_zero) + bias.
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
// x may be uint8, representing step * (code - zero).
struct AttentionGate {
    const void* x;
    const float *weight, *scale, *shift;
    float* out;
    DType dtype;
    int64_t n, hw, c, k;
    int threads;
    float step, zero;
};

// Bilinear resize of scores (n h w c) to full_h x full_w, cropped to the first out_h x out_w.
// upsample_bilinear writes n c out_h out_w in dtype; upsample_argmax n out_h out_w uint8. For
// upsample_bilinear_backward, scores is the gradient of the resize's result, and out the gradient of its
// scores: n c h w.
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

// Cross-entropy of the resize to the size of target: n out_h out_w, uint8 or int64. Each pixel's loss
// is (1 - label_smoothing) weight[t] (log-sum-exp - score[t]) + label_smoothing / c times the sum over
// classes of weight (log-sum-exp - score). Pixels labelled ignore_index have no loss.
struct UpsampleCrossEntropy {
    Resize resize;  // its out is not used
    const void* target;
    bool wide_target;  // whether target is int64
    int64_t ignore_index;
    const float* weight;  // per class; null: 1
    float label_smoothing;
    float* losses;    // n out_h out_w, -1 where ignored; or null
    float* gradient;  // gradient of the sum of losses: n c h w; or null
    // Or null: losses of an earlier call; only those above cutoff get a gradient, and a share of those equal
    // to it.
    const float* kept_of;
    float cutoff, share;
};

struct CrossEntropySums {
    double loss, weight;  // weights of the labels; 0 where ignored
    int64_t unknown;      // index of the first label that is neither a class nor ignored, -1 if all are
};

// Selects the losses that hard example mining keeps: those above the threshold, and at least the `least`
// greatest.
struct SelectHardest {
    const float* losses;  // -1: ignored
    int64_t count, least;
    float threshold;
    int threads;
};

// The kept losses are those above cutoff, and `share` of each one equal to it.
struct Hardest {
    float cutoff, share;
    double loss;  // sum of the kept losses
    int64_t kept;
};

// out = act(scale * conv(x, weight) + shift + residual) + skip.
//
// x: n h w c of dtype. out, residual and skip share strides (in elements), so that a transposed convolution's
// parities can write interleaved pixels. Weights: per panel of 16 output channels and chunk of input
// channels, kernel_h x kernel_w x chunk x 16 words of product (ops/conv_bn_act.py packs them).
//
// For int8 and int16 products, x, residual and skip are uint8, out is uint8 or float32:
// act(scale * (conv(x, weight) + start) + shift + residual_scale * residual) + skip_scale * skip + bias.
struct Conv {
    const void *x, *weight;
    const float *scale, *shift;   // per output channel; null: 1 and 0. For uint8 in whole panels
    const void *residual, *skip;  // or null
    void* out;
    DType dtype;
    Product product;
    int64_t n, h, w, c, out_h, out_w, out_c;
    int64_t kernel_h, kernel_w, stride, pad_h, pad_w, chunk;  // chunk: words
    int64_t stride_n, stride_h, stride_w;
    float slope;  // slope of the activation: 0 relu, 1 none
    int threads;
    const int32_t* start;  // whole panels: minus x_zero times the sum of each channel's weights; or null
    int x_zero;            // zero point of x
    float residual_scale, skip_scale, bias;
    bool to_codes;
};

// The same for 3x3 kernels of padding 1 by Winograd's minimal filtering: stride 1 with tiles of 2 or 4,
// stride 2 with tiles of 4, or the transposed convolution of stride 2 and output padding 1 with tiles of 4.
//
// Weights: if chunk is 0, per panel of 16 output channels, (tile + 2)^2 frequencies x c x 16 float32, or for
// int16 c / 2 x 16 words (ops/_conv_winograd.py transforms them); else untransformed, like Conv's in chunks
// of that many words of float32, or of bfloat16 for int16 products. units, for int16: quantization step of
// the weights, panels x (tile + 2)^2 x 16; levels: factor of each input channel, by which its weights are
// divided.
//
// With x_zero and the fields after it, uint8 to uint8 as in Conv, but without start: x_zero is subtracted
// from x.
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
// Winograd's filtering of stride 1 with tiles of 4. x, hidden, out: n h w c, dense; both convolutions use the
// same transformed weights.
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
// padded with zeros to padded_h x padded_w and resized bilinearly to h x w, where these differ. u8 images are
// NHWC, and `values` (256 x 3) holds the normalised form of every value; other images, float32 or bf16, are
// NCHW and already normalised.
//
// int8 products use raw images; floating ones are first converted to raw[c] * x + raw[3 + c], rounded; `zero`
// stands for 0. For uint8 results, `bias` is added before rounding; scale and shift are in whole panels.
//
// stem_winograd multiplies float32; its weights are per panel of 16 output channels 7 x 7 frequencies x 12 x
// 16 (ops/_stem_winograd.py transforms them), and it does not read `product`, `raw` and `zero`.
struct Stem {
    const void* image;
    const float* values;
    const void* weight;  // as in Conv, with a kernel row's pixels as the channels of one tap
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

// codes = x * codes_scale + zero, rounded to nearest, ties to even, clamped to [0, 255]; NaN becomes zero.
// Then the bits of `sign` are flipped: 128 converts uint8 with zero point 128 to int8.
struct Quantize {
    const void* x;
    uint8_t* codes;
    DType dtype;
    int64_t count;
    float codes_scale, zero;
    uint8_t sign;
    int threads;
};

// out = act((x - mean) / sqrt(var + eps) * weight + bias + residual) * noise; unless given, mean and var are
// computed per channel over n x hw pixels. x, residual, out: n hw c; noise: n c; the others: c. residual,
// weight, bias and noise may be null. mask, or null: (c + 7) / 8 bytes per pixel, whose bits say where the
// activation's argument was positive.
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

// The gradients of BnActDropout, given grad of its out. grad_residual may be null; null mask: no activation.
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

// out = max over 3x3 windows, stride 2 and padding 1; taps: each result's position in its window, 0 to 8: the
// first of equal ones, the last NaN. x: n h w c; out, taps: n (h + 1) / 2 (w + 1) / 2 c.
struct MaxPool {
    const void* x;
    void* out;
    uint8_t* taps;
    DType dtype;
    int64_t n, h, w, c;
    int threads;
};

// The gradient of MaxPool, given grad of its out.
struct MaxPoolBackward {
    const void* grad;
    const uint8_t* taps;
    void* grad_x;
    DType dtype;
    int64_t n, h, w, c;
    int threads;
};

// Operations per second of products alone, on the given number of threads.
struct Peak {
    Product product;
    int threads;
    int64_t milliseconds;
};

struct Kernels {
    const char* isa;
    bool has[4];  // whether the instruction set supports each product
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

// The best table that this CPU can run, or the one selected by `force_isa`.
const Kernels& kernels();

// Selects by name; false if it was not compiled or this CPU cannot run it.
bool force_isa(const char* isa);

// Names of the compiled tables that this CPU can run, best first, null-terminated.
const char* const* runnable_isas();

}  // namespace shelfkern
