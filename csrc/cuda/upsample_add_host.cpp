#include <stdexcept>

#include "upsample_add_thread.h"

namespace shelfkern {
namespace cuda {

void upsample_add_on_host(const UpsampleAdd& a) {
    with_type(a, [&](auto pack) {
        using T = std::remove_reference_t<decltype(pack.v[0])>;
        constexpr int kVector = sizeof(pack) / sizeof(T);
        for (int64_t thread = 0; thread < blocks<kVector>(a) * kThreads; ++thread) {
            upsample_add_thread<T, kVector>(a, thread);
        }
    });
}

#if !defined(SHELFKERN_WITH_CUDA)
void launch_upsample_add(const UpsampleAdd&, void*) {
    throw std::runtime_error("upsample_add: shelfkern was built without CUDA");
}
#endif

}  // namespace cuda
}  // namespace shelfkern
