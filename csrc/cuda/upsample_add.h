// skip + gate[n, c] * nearest_x2(x) on NHWC tensors, on a GPU.
#pragma once

#include <cstdint>

namespace shelfkern {
namespace cuda {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 3 };

// x: n h w c; skip, out: n 2h 2w c; gate: n c float32 or null.
struct UpsampleAdd {
    const void *x, *skip;
    const float* gate;
    void* out;
    DType dtype;
    int64_t n, h, w, c;
};

// Enqueues the kernel on a cudaStream_t; throws std::runtime_error where CUDA refuses.
void launch_upsample_add(const UpsampleAdd& args, void* stream);

// Runs every thread of the same grid one after another on the CPU: the kernel's own code, for tests.
void upsample_add_on_host(const UpsampleAdd& args);

}  // namespace cuda
}  // namespace shelfkern
