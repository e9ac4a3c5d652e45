#include <atomic>
#include <cstring>

#include "kernels.h"

namespace shelfkern {

// Those that CMakeLists.txt compiles are defined.
namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_vnni {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}

namespace {

struct Runnable {
    const Kernels* tables[6] = {};
    const char* names[6] = {};
    int count = 0;

    void add(const Kernels& table) {
        tables[count] = &table;
        names[count++] = table.isa;
    }

    Runnable() {
#if defined(__x86_64__)
        __builtin_cpu_init();
        [[maybe_unused]] const bool has_avx2 =
            __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
        [[maybe_unused]] const bool has_avx512 =
            has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
#if defined(SHELFKERN_HAS_avx512_bf16)
        if (has_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
            add(avx512_bf16::table);
#endif
#if defined(SHELFKERN_HAS_avx512_vnni)
        if (has_avx512 && __builtin_cpu_supports("avx512vnni")) add(avx512_vnni::table);
#endif
#if defined(SHELFKERN_HAS_avx512)
        if (has_avx512) add(avx512::table);
#endif
#if defined(SHELFKERN_HAS_avx2)
        if (has_avx2) add(avx2::table);
#endif
        add(baseline::table);
    }
};

const Runnable& runnable() {
    static const Runnable instance;
    return instance;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* table = chosen.load(std::memory_order_relaxed);
    return table ? *table : *runnable().tables[0];
}

bool force_isa(const char* isa) {
    for (int i = 0; i < runnable().count; ++i) {
        if (std::strcmp(runnable().names[i], isa) == 0) {
            chosen = runnable().tables[i];
            return true;
        }
    }
    return false;
}

const char* const* runnable_isas() { return runnable().names; }

}  // namespace shelfkern
