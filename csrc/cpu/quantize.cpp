#include "../common/parallel.h"
#include "codes.h"
#include "dtypes.h"

namespace shelfkern {
namespace SHELFKERN_ISA {
namespace {

// Elements per task: enough to amortise starting a thread.
constexpr int64_t kTask = 32 * 1024;

void store_codes(const Quantize& a, vf v, uint8_t* to, int64_t count) {
    v = v * splat(a.codes_scale);
    v = v == v ? v : vf{};
    // For signed results: adding zero must not cost precision.
    if (a.sign) v = whole_float(v);
    uint8_t codes[kLanes];
    store(codes, v + splat(a.zero));
    const vb bytes = load_vector<vb>(codes) ^ a.sign;
    std::memcpy(to, &bytes, count);
}

template <typename T>
void run(const Quantize& a) {
    const T* x = static_cast<const T*>(a.x);
    parallel_for(a.threads, (a.count + kTask - 1) / kTask, [&](int64_t task) {
        int64_t i = task * kTask;
        const int64_t end = i + kTask < a.count ? i + kTask : a.count;
        for (; i + kLanes <= end; i += kLanes) store_codes(a, load(x + i), a.codes + i, kLanes);
        if (i == end) return;
        vf rest = {};
        for (int64_t j = i; j < end; ++j) rest[j - i] = load_one(x + j);
        store_codes(a, rest, a.codes + i, end - i);
    });
}

}  // namespace

void quantize(const Quantize& args) {
    with_type<float, bf16>(args.dtype, [&](auto t) { run<decltype(t)>(args); });
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
