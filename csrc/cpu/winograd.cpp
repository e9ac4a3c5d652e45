// 3x3 convolutions of padding 1, and transposed ones of stride 2, with fewer multiplications.
//
// The input of a block of tiles is transformed once, into V (winograd_input.h), and for each group of weight
// panels multiplied, frequency after frequency, into M (winograd_products.h), from which the output transform
// and the epilogue compute outputs (winograd_output.h). Blocks are processed in bands or waves.
#include "dtypes.h"
#include "winograd_bands.h"
#include "winograd_filters.h"
#include "winograd_shared_block.h"
#include "winograd_waves.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

template <typename Filter, typename T>
void run(const Winograd& a) {
    const Geometry<Filter> g{a};
    if (g.tiles == 0) return;
    if (a.chunk > 0) {
        run_waves<Filter, T>(g);
    } else {
        run_bands<Filter, T>(g);
    }
}

template <typename P, typename T>
void run_filter(const Winograd& a) {
    if (a.transposed) {
        run<Multiplied<FilterTransposed, P>, T>(a);
    } else if (a.stride == 2) {
        run<Multiplied<FilterStride2, P>, T>(a);
    } else if (a.tile == 4) {
        run<Multiplied<Filter4, P>, T>(a);
    } else if constexpr (P::kElements == 1) {
        run<Multiplied<Filter2, P>, T>(a);
    }
}

}  // namespace

void winograd_block(const WinogradBlock& args) {
    if (args.product == Product::int16) return run_block<Multiplied<Filter4, Int16>, bf16>(args);
    with_type<float, bf16>(args.dtype,
                           [&](auto t) { run_block<Multiplied<Filter4, Float32>, decltype(t)>(args); });
}

void winograd(const Winograd& args) {
    if (args.product == Product::float32) {
        return with_type<float, bf16>(args.dtype, [&](auto t) { run_filter<Float32, decltype(t)>(args); });
    }
    with_type<bf16, uint8_t>(args.dtype, [&](auto t) { run_filter<Int16, decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
