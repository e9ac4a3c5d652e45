// One instruction set's kernels, collected.
#include "kernels.h"

#define SHELFKERN_QUOTE(name) #name
#define SHELFKERN_NAME(name) SHELFKERN_QUOTE(name)

namespace shelfkern {
namespace SHELFKERN_ISA {

void upsample_add(const UpsampleAdd&);
void attention_gate(const AttentionGate&);
void upsample_bilinear(const Resize&);
void upsample_argmax(const Resize&);
void upsample_softmax_sum(const SoftmaxSum&);
void conv_bn_act(const Conv&);
void stem(const Stem&);
void winograd(const Winograd&);

extern const Kernels table;
const Kernels table = {
    SHELFKERN_NAME(SHELFKERN_ISA), upsample_add, attention_gate, upsample_bilinear, upsample_argmax,
    upsample_softmax_sum,          conv_bn_act,  stem,           winograd};

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
