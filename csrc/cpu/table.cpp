// One instruction set's kernels, collected.
#include "kernels.h"

#define SHELFKERN_QUOTE(name) #name
#define SHELFKERN_NAME(name) SHELFKERN_QUOTE(name)

namespace shelfkern {
#if defined(SHELFKERN_BASE)
namespace SHELFKERN_BASE {
extern const Kernels table;
}
#endif

namespace SHELFKERN_ISA {

void upsample_add(const UpsampleAdd&);
void attention_gate(const AttentionGate&);
void upsample_bilinear(const Resize&);
void upsample_bilinear_backward(const Resize&);
void upsample_argmax(const Resize&);
void upsample_softmax_sum(const SoftmaxSum&);
CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropy&);
Hardest select_hardest(const SelectHardest&);
void conv_bn_act(const Conv&);
void stem(const Stem&);
void stem_winograd(const Stem&);
void winograd(const Winograd&);
void winograd_block(const WinogradBlock&);
void quantize(const Quantize&);
void bn_act_dropout(const BnActDropout&);
void bn_act_dropout_backward(const BnActDropoutBackward&);
void max_pool(const MaxPool&);
void max_pool_backward(const MaxPoolBackward&);
double peak(const Peak&);

#if defined(__AVX512BF16__)
constexpr bool kHasBfloat16 = true;
#else
constexpr bool kHasBfloat16 = false;
#endif
#if defined(__AVX512VNNI__)
constexpr bool kHasIntegers = true;
#else
constexpr bool kHasIntegers = false;
#endif

extern const Kernels table;
#if defined(SHELFKERN_BASE)
// Only kernels that use dot products are compiled again.
const Kernels table = [] {
    Kernels kernels = SHELFKERN_BASE::table;
    kernels.isa = SHELFKERN_NAME(SHELFKERN_ISA);
    kernels.has[static_cast<int>(Product::bfloat16)] = kHasBfloat16;
    kernels.has[static_cast<int>(Product::int8)] = kHasIntegers;
    kernels.has[static_cast<int>(Product::int16)] = kHasIntegers;
    kernels.conv_bn_act = conv_bn_act;
    kernels.stem = stem;
    kernels.winograd = winograd;
    kernels.winograd_block = winograd_block;
    kernels.peak = peak;
    return kernels;
}();
#else
const Kernels table = {SHELFKERN_NAME(SHELFKERN_ISA),
                       {true, kHasBfloat16, kHasIntegers, kHasIntegers},
                       upsample_add,
                       attention_gate,
                       upsample_bilinear,
                       upsample_bilinear_backward,
                       upsample_argmax,
                       upsample_softmax_sum,
                       upsample_cross_entropy,
                       select_hardest,
                       conv_bn_act,
                       stem,
                       stem_winograd,
                       winograd,
                       winograd_block,
                       quantize,
                       bn_act_dropout,
                       bn_act_dropout_backward,
                       max_pool,
                       max_pool_backward,
                       peak};
#endif

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
