#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "upsample_add_thread.h"

namespace shelfkern {
namespace cuda {
namespace {

template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) upsample_add_kernel(UpsampleAdd args) {
    upsample_add_thread<T, kVector>(args, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
}

}  // namespace

void launch_upsample_add(const UpsampleAdd& a, void* stream) {
    with_type(a, [&](auto pack) {
        using T = std::remove_reference_t<decltype(pack.v[0])>;
        constexpr int kVector = sizeof(pack) / sizeof(T);
        const int64_t count = blocks<kVector>(a);
        if (count == 0) return;
        if (count > 0x7fffffff) throw std::runtime_error("upsample_add: the output has too many elements");
        upsample_add_kernel<T, kVector>
            <<<static_cast<unsigned>(count), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(a);
        const cudaError_t status = cudaGetLastError();
        if (status != cudaSuccess) {
            throw std::runtime_error(std::string("upsample_add: ") + cudaGetErrorString(status));
        }
    });
}

}  // namespace cuda
}  // namespace shelfkern
