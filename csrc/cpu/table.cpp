// One instruction set's kernels, collected.
#include "kernels.h"

#define SHELFKERN_QUOTE(name) #name
#define SHELFKERN_NAME(name) SHELFKERN_QUOTE(name)

#if !defined(SHELFKERN_BASE)
#define SHELFKERN_BASE SHELFKERN_ISA
#endif

namespace shelfkern {

// Compiled once for all instruction sets with the same base.
namespace SHELFKERN_BASE {
void upsample_add(const UpsampleAdd&);
void attention_gate(const AttentionGate&);
void upsample_bilinear(const Resize&);
void upsample_bilinear_backward(const Resize&);
void upsample_argmax(const Resize&);
void upsample_softmax_sum(const SoftmaxSum&);
CrossEntropySums upsample_cross_entropy(const UpsampleCrossEntropy&);
Hardest select_hardest(const SelectHardest&);
void stem_winograd(const Stem&);
void quantize(const Quantize&);
void bn_act_dropout(const BnActDropout&);
void bn_act_dropout_backward(const BnActDropoutBackward&);
void max_pool(const MaxPool&);
void max_pool_backward(const MaxPoolBackward&);
}  // namespace SHELFKERN_BASE

namespace SHELFKERN_ISA {

void conv_bn_act(const Conv&);
void stem(const Stem&);
void winograd(const Winograd&);
void winograd_block(const WinogradBlock&);
double peak(const Peak&);

#if defined(__AVX512BF16__)
constexpr bool kHasBfloat16 = true;
#else
constexpr bool kHasBfloat16 = false;
#endif
#if defined(__AVX512VNNI__)
constexpr bool kHasInt8 = true;
#else
constexpr bool kHasInt8 = false;
#endif
#if defined(__SSE2__)
constexpr bool kHasInt16 = true;
#else
constexpr bool kHasInt16 = false;
#endif

// A constant: an initialiser, in this instruction set's code, would run on every CPU that loads the module.
extern const Kernels table;
constexpr Kernels table = {SHELFKERN_NAME(SHELFKERN_ISA),
                           {true, kHasBfloat16, kHasInt8, kHasInt16},
                           SHELFKERN_BASE::upsample_add,
                           SHELFKERN_BASE::attention_gate,
                           SHELFKERN_BASE::upsample_bilinear,
                           SHELFKERN_BASE::upsample_bilinear_backward,
                           SHELFKERN_BASE::upsample_argmax,
                           SHELFKERN_BASE::upsample_softmax_sum,
                           SHELFKERN_BASE::upsample_cross_entropy,
                           SHELFKERN_BASE::select_hardest,
                           conv_bn_act,
                           stem,
                           SHELFKERN_BASE::stem_winograd,
                           winograd,
                           winograd_block,
                           SHELFKERN_BASE::quantize,
                           SHELFKERN_BASE::bn_act_dropout,
                           SHELFKERN_BASE::bn_act_dropout_backward,
                           SHELFKERN_BASE::max_pool,
                           SHELFKERN_BASE::max_pool_backward,
                           peak};

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
