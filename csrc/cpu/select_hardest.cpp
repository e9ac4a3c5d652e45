// Selects the losses that online hard example mining keeps: the smallest of the `least` greatest, by a search
// over the bits of the losses, then sums. Neither depends on the number of threads.
#include <algorithm>
#include <array>
#include <vector>

#include "../common/parallel.h"
#include "kernels.h"
#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Losses per task.
constexpr int64_t kBlock = 1 << 16;

// Non-negative losses have the order of their bits, NaN last; ignored ones come first.
uint32_t rank_of(float loss) {
    uint32_t bits;
    std::memcpy(&bits, &loss, sizeof(bits));
    return loss < 0 ? 0 : (bits & 0x7fffffff) + 1;
}

float loss_of(uint32_t rank) {
    if (rank == 0) return -1;
    float loss;
    const uint32_t bits = rank - 1;
    std::memcpy(&loss, &bits, sizeof(loss));
    return loss;
}

// Calls block(begin, end) for every block, in parallel, and returns their results.
template <typename Result, typename Block>
std::vector<Result> of_blocks(const SelectHardest& a, const Block& block) {
    std::vector<Result> results(static_cast<size_t>((a.count + kBlock - 1) / kBlock));
    parallel_for(a.threads, static_cast<int64_t>(results.size()),
                 [&](int64_t i) { results[i] = block(i * kBlock, std::min((i + 1) * kBlock, a.count)); });
    return results;
}

// Digits of a rank, most significant first.
constexpr int kDigits = 3, kBits[kDigits] = {11, 11, 10}, kShift[kDigits] = {21, 10, 0};
using Counts = std::array<int64_t, 1 << 11>;

// The rank of the smallest of the `least` greatest losses, digit by digit.
uint32_t rank_of_last(const SelectHardest& a) {
    uint32_t prefix = 0;
    int64_t wanted = a.least;
    for (int digit = 0; digit < kDigits; ++digit) {
        const int shift = kShift[digit], above = shift + kBits[digit];
        const uint32_t mask = (1u << kBits[digit]) - 1;
        const auto same = [&](uint32_t rank) { return digit == 0 || rank >> above == prefix >> above; };
        const auto found = of_blocks<Counts>(a, [&](int64_t begin, int64_t end) {
            Counts counts = {};
            for (int64_t i = begin; i < end; ++i) {
                const uint32_t rank = rank_of(a.losses[i]);
                if (same(rank)) ++counts[rank >> shift & mask];
            }
            return counts;
        });
        uint32_t value = mask;
        for (;; --value) {
            int64_t count = 0;
            for (const Counts& counts : found) count += counts[value];
            if (count >= wanted || value == 0) break;
            wanted -= count;
        }
        prefix |= value << shift;
    }
    return prefix;
}

struct Above {
    double loss = 0;
    int64_t above = 0, equal = 0;
};

// Sums the losses above cutoff; NaN is above everything.
Above add_above(const SelectHardest& a, float cutoff) {
    Above sum;
    for (const Above& part : of_blocks<Above>(a, [&](int64_t begin, int64_t end) {
             constexpr int kSums = 8;
             double losses[kSums] = {};
             Above block;
             for (int64_t i = begin; i < end; ++i) {
                 const float loss = a.losses[i];
                 losses[i % kSums] += loss <= cutoff ? 0 : static_cast<double>(loss);
                 block.above += loss <= cutoff ? 0 : 1;
                 block.equal += loss == cutoff;
             }
             for (const double loss : losses) block.loss += loss;
             return block;
         })) {
        sum.loss += part.loss;
        sum.above += part.above;
        sum.equal += part.equal;
    }
    return sum;
}

}  // namespace

Hardest select_hardest(const SelectHardest& a) {
    const Above hard = add_above(a, a.threshold);
    if (hard.above >= a.least) return {a.threshold, 0, hard.loss, hard.above};
    const float cutoff = loss_of(rank_of_last(a));
    const Above found = add_above(a, cutoff);
    const double missing = static_cast<double>(a.least - found.above);
    const double share = missing / static_cast<double>(std::max<int64_t>(found.equal, 1));
    // Ignored pixels fill the remaining places with a loss of 0.
    const double filled = cutoff > 0 ? missing * static_cast<double>(cutoff) : 0;
    return {cutoff, static_cast<float>(share), found.loss + filled, a.least};
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
