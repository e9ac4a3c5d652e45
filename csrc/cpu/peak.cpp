// The machine's peak rate: products of registers, without loads or stores.
#include <chrono>
#include <vector>

#include "../common/parallel.h"
#include "kernels.h"
#include "product.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

using Clock = std::chrono::steady_clock;

// Independent sums, enough to hide a product's latency; they and the factors all fit in registers.
#if defined(__AVX512F__)
constexpr int kSums = 24;
#define SHELFKERN_REGISTER "+v"
#else
constexpr int kSums = 12;
#define SHELFKERN_REGISTER "+x"
#endif
constexpr int64_t kRepeats = 20000;

// Operations per call.
template <typename P>
double multiply() {
    using Sum = typename P::Sum;
    Sum sums[kSums] = {};
    typename P::Weights w{};
    for (int64_t i = 0; i < kRepeats; ++i) {
#pragma GCC unroll 24
        for (int s = 0; s < kSums; ++s) {
            asm volatile("" : SHELFKERN_REGISTER(w));  // hides that each product is the same
            sums[s] = P::add(sums[s], 1, w);
            asm volatile("" : SHELFKERN_REGISTER(sums[s]));  // hides from the compiler that all are equal
        }
    }
    return 2.0 * kRepeats * kSums * kLanes * P::kElements;
}

template <typename P>
double rate(const Peak& a) {
    const Clock::time_point begin = Clock::now(), end = begin + std::chrono::milliseconds(a.milliseconds);
    std::vector<double> done(a.threads);
    parallel_for(a.threads, a.threads, [&](int64_t task) {
        do {
            done[task] += multiply<P>();
        } while (Clock::now() < end);
    });
    const std::chrono::duration<double> seconds = Clock::now() - begin;
    double operations = 0;
    for (double one : done) operations += one;
    return operations / seconds.count();
}

}  // namespace

double peak(const Peak& args) {
    switch (args.product) {
        case Product::float32:
            return rate<Float32>(args);
        case Product::bfloat16:
            return rate<Bfloat16>(args);
        case Product::int8:
            return rate<Int8>(args);
        case Product::int16:
            return rate<Int16>(args);
    }
    return 0;
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
