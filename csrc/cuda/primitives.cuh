// A kernel's only access to the hardware. Every primitive has two implementations: nvcc compiles device code
// (below), any other compiler runs it on the CPU and checks it (../emulation/primitives.h).
//
// A kernel and its launch:
//
//     struct Args { Global<const float> x; Global<float> out; int64_t count; };
//
//     KERNEL(kThreads) scale_kernel(const Args args) {          // or KERNEL(kThreads, kMinBlocks)
//         wait_for_previous();                                  // before any access other than weights
//         const int64_t i = int64_t{block_index_x()} * kThreads + thread_index();
//         if (i < args.count) args.out.store(i, 2 * args.x.load(i));
//     }
//
//     launch(scale_kernel, {"scale", kThreads, 0, stream}, {ceil_div(count, kThreads)}, args);
//
// Functions called by kernels begin with DEVICE. Arithmetic is plain C++ (expf, fmaf, fmaxf);
// #pragma unroll may be used.
//
// Memory. Indices count elements; packs are Pack<T, N> of 1, 2, 4, 8 or 16 bytes, aligned to their size.
//     Global<T>    global(pointer, count), view(Nhwc): activations. Indices are 64-bit.
//     Weights<T>   weights(pointer, count): memory that no earlier kernel in the stream writes.
//     View<T>      view<T>(nhwc): .data is a Global<T>, .offset(n, y, x) the first channel's index.
//     Shared<T>    shared<T>(byte_offset, count): a window of the block's dynamic shared memory.
// Each has load(i), load_pack<N>(i), store(i, value), store_pack(i, pack) and + offset; Global and
// Weights convert to false where the pointer was null.
//
// Threads. thread_index(), block_index_x/y/z(), block_count_x/y/z(), and lane() and warp() within the block.
//     opaque(value)                hides from the compiler that a value is constant, so that values derived
//                                  from it are recomputed instead of kept in registers.
//     barrier()                    every thread of the block; orders shared memory.
//     warp_barrier()               every lane of the warp; orders shared memory within the warp.
//     shuffle_xor(value, mask),    every lane of the warp; 4-byte values; orders no memory, nor do
//     shuffle(value, lane)         ldmatrix and mma.
//
// Asynchronous copies, from global to shared memory.
//     cp_async_16(dst, src, valid) 16 bytes, aligned; if not valid, writes zeros and does not read src.
//     cp_async_commit()            closes this thread's group of copies.
//     cp_async_wait<N>()           returns when at most N of this thread's latest groups are in flight.
// Other threads see a copy after its issuing thread has waited for it and all have passed a barrier.
//
// Tensor cores (PTX's fragment layouts; g = lane() / 4, t = lane() % 4). Executed by all lanes together.
//     ldmatrix_x4(r, row), ldmatrix_x2(r, row): lane 8 * i + j gives the address of row j of the 8x8
//         matrix i, 16 bytes, aligned; r[i] receives elements (g, 2t) and (g, 2t + 1) of matrix i.
//         x2 does not use the rows of lanes 16 to 31.
//     ldmatrix_x4_trans, ldmatrix_x2_trans: r[i] receives elements (2t, g) and (2t + 1, g).
//     mma_m16n8k16<T>(d, a, b): d += a @ b with T of BF16 or F16.
//         a 16x16: a[0] (g, 2t..), a[1] (g + 8, 2t..), a[2] (g, 2t + 8..), a[3] (g + 8, 2t + 8..)
//         b 16x8:  b[0] (2t.., g), b[1] (2t + 8.., g)
//         d 16x8:  d[0], d[1] (g, 2t..), d[2], d[3] (g + 8, 2t..)
//
// Overlapping launches (sm_90 and later; no effect before): on a Stream with overlap a kernel may start
// before its predecessor has ended.
//     wait_for_previous()          returns when the predecessor has ended; every thread calls it before
//                                  its first access to global memory other than weights.
//     release_next()               allows the next launch to start once all blocks have called it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "half.h"
#include "tensor.h"

namespace shelfkern {
namespace cuda {

struct Launch {
    const char* name;  // the op, for error messages
    int threads;       // per block: a multiple of 32
    int shared_bytes = 0;
    Stream stream = {};
};

struct Grid {
    int64_t x = 1, y = 1, z = 1;

    bool empty() const { return x == 0 || y == 0 || z == 0; }
};

constexpr int64_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

// Throws std::runtime_error where the hardware does not support the grid.
inline void check_grid(const Launch& launch, const Grid& grid) {
    if (grid.x <= kMaxGridX && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ) return;
    throw std::runtime_error(std::string(launch.name) + ": the grid is " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                             " blocks, it may be 2147483647 x 65535 x 65535");
}

}  // namespace cuda
}  // namespace shelfkern

#if !defined(__CUDACC__)
#include "../emulation/primitives.h"
#else
#include <cuda_runtime.h>

#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE __device__ __forceinline__

namespace shelfkern {
namespace cuda {

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }
DEVICE int block_index_x() { return blockIdx.x; }
DEVICE int block_index_y() { return blockIdx.y; }
DEVICE int block_index_z() { return blockIdx.z; }
DEVICE int block_count_x() { return gridDim.x; }
DEVICE int block_count_y() { return gridDim.y; }
DEVICE int block_count_z() { return gridDim.z; }

// The value, with its origin hidden from the compiler.
DEVICE int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

template <typename T>
DEVICE T shuffle_xor(T value, int mask) {
    static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
    return __shfl_xor_sync(0xffffffff, value, mask);
}

template <typename T>
DEVICE T shuffle(T value, int source_lane) {
    static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
    return __shfl_sync(0xffffffff, value, source_lane);
}

// The type that moves a pack in one instruction.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
    using Type = unsigned char;
};
template <>
struct Word<2> {
    using Type = unsigned short;
};
template <>
struct Word<4> {
    using Type = unsigned int;
};
template <>
struct Word<8> {
    using Type = uint2;
};
template <>
struct Word<16> {
    using Type = uint4;
};

// A bare pointer with the access functions that the emulator checks.
template <typename T, bool kReadOnly>
struct Pointer {
    using Value = std::remove_const_t<T>;
    T* data;

    template <int N>
    DEVICE Pack<Value, N> load_pack(int64_t i) const {
        using W = typename Word<sizeof(T) * N>::Type;
        const W* at = reinterpret_cast<const W*>(data + i);
        W word;
        if constexpr (kReadOnly) {
            word = __ldg(at);
        } else {
            word = *at;
        }
        Pack<Value, N> pack;
        memcpy(&pack, &word, sizeof(pack));
        return pack;
    }

    template <int N>
    DEVICE void store_pack(int64_t i, const Pack<Value, N>& pack) const {
        using W = typename Word<sizeof(T) * N>::Type;
        W word;
        memcpy(&word, &pack, sizeof(pack));
        *reinterpret_cast<W*>(data + i) = word;
    }

    DEVICE Value load(int64_t i) const { return load_pack<1>(i)[0]; }
    DEVICE void store(int64_t i, Value value) const { data[i] = value; }
    DEVICE Pointer operator+(int64_t offset) const { return {data + offset}; }
    HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

template <typename T>
using Global = Pointer<T, false>;
template <typename T>
using Weights = Pointer<const T, true>;

template <typename T>
Global<T> global(T* pointer, int64_t) {
    return {pointer};
}

template <typename T>
Weights<T> weights(const T* pointer, int64_t) {
    return {pointer};
}

template <typename T>
struct Shared {
    T* data;

    template <int N>
    DEVICE Pack<T, N> load_pack(int i) const {
        return Pointer<T, false>{data}.template load_pack<N>(i);
    }
    template <int N>
    DEVICE void store_pack(int i, const Pack<T, N>& pack) const {
        Pointer<T, false>{data}.store_pack(i, pack);
    }
    DEVICE T load(int i) const { return data[i]; }
    DEVICE void store(int i, T value) const { data[i] = value; }
    DEVICE Shared operator+(int offset) const { return {data + offset}; }
    DEVICE unsigned address() const { return static_cast<unsigned>(__cvta_generic_to_shared(data)); }
};

template <typename T>
DEVICE Shared<T> shared(int byte_offset, int) {
    extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
    return {reinterpret_cast<T*>(dynamic_shared_memory + byte_offset)};
}

template <typename T, typename U, bool kReadOnly>
DEVICE void cp_async_16(Shared<T> dst, Pointer<U, kReadOnly> src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst.address()), "l"(src.data),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kInFlight>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kInFlight) : "memory");
}

template <typename T>
DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address())
                 : "memory");
}

template <typename T>
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row.address())
                 : "memory");
}

template <typename T>
DEVICE void ldmatrix_x2(uint32_t (&r)[2], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row.address())
                 : "memory");
}

template <typename T>
DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], Shared<T> row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row.address())
                 : "memory");
}

template <typename T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, BF16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        static_assert(std::is_same_v<T, F16>, "tensor cores take BF16 or F16");
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

DEVICE void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline void check_cuda(const Launch& launch, cudaError_t status) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // clears the error, or the next call would report it
    throw std::runtime_error(std::string(launch.name) + ": " + cudaGetErrorString(status));
}

// Whether the current device can start a kernel before its predecessor has ended.
inline bool overlaps_launches(const Launch& launch) {
    int device = 0, major = 0;
    check_cuda(launch, cudaGetDevice(&device));
    check_cuda(launch, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major >= 9;
}

// Enqueues kernel(args); does nothing for an empty grid. Throws std::runtime_error on CUDA errors.
template <typename Args>
void launch(void (*kernel)(Args), const Launch& launch, const Grid& grid, const Args& args) {
    if (grid.empty()) return;
    check_grid(launch, grid);
    // More than the default limit of 48 KB must be requested.
    if (launch.shared_bytes > 48 * 1024) {
        check_cuda(launch, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                launch.shared_bytes));
    }
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim =
        dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(launch.threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = static_cast<cudaStream_t>(launch.stream.handle);
    config.attrs = &overlap;
    config.numAttrs = launch.stream.overlap && overlaps_launches(launch) ? 1 : 0;
    check_cuda(launch, cudaLaunchKernelEx(&config, kernel, args));
}

}  // namespace cuda
}  // namespace shelfkern
#endif

namespace shelfkern {
namespace cuda {

// An Nhwc for use in a kernel.
template <typename T>
struct View {
    Global<T> data;
    int64_t stride_n, stride_h, stride_w;

    DEVICE int64_t offset(int64_t n, int64_t y, int64_t x) const {
        return n * stride_n + y * stride_h + x * stride_w;
    }
};

template <typename T>
View<T> view(const Nhwc& t) {
    return {global(static_cast<T*>(t.data), t.extent()), t.stride_n, t.stride_h, t.stride_w};
}

}  // namespace cuda
}  // namespace shelfkern
