// Integer arithmetic, and the division of a range into parts.
#pragma once

#include <cstdint>

namespace shelfkern {
namespace SHELFKERN_ISA {

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Span {
    int64_t begin = 0, end = 0;

    int64_t count() const { return end - begin; }
};

// The i-th of n nearly equal parts.
static inline Span share(int64_t total, int64_t i, int64_t n) { return {total * i / n, total * (i + 1) / n}; }

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
