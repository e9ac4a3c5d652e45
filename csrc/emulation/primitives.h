// The CPU implementation of ../cuda/primitives.cuh, where it is documented: the emulator checks every access.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "emulator.h"

#define KERNEL(...) void
#define DEVICE inline

// The line of the kernel's own code that called a primitive, for reports.
#define SHELFKERN_LINE int line = __builtin_LINE()

namespace shelfkern {
namespace cuda {

using std::min, std::max;

DEVICE int thread_index() { return emulation::position.thread; }
DEVICE int lane() { return emulation::position.thread % 32; }
DEVICE int warp() { return emulation::position.thread / 32; }
DEVICE int block_index_x() { return static_cast<int>(emulation::position.block_x); }
DEVICE int block_index_y() { return static_cast<int>(emulation::position.block_y); }
DEVICE int block_index_z() { return static_cast<int>(emulation::position.block_z); }
DEVICE int block_count_x() { return static_cast<int>(emulation::position.blocks_x); }
DEVICE int block_count_y() { return static_cast<int>(emulation::position.blocks_y); }
DEVICE int block_count_z() { return static_cast<int>(emulation::position.blocks_z); }

DEVICE void barrier(SHELFKERN_LINE) { emulation::barrier(line); }
DEVICE void warp_barrier(SHELFKERN_LINE) { emulation::warp_barrier(line); }

struct Shuffle {
    uint32_t given, received;
    int source;
};

DEVICE void complete_shuffle(void* const* requests) {
    for (int i = 0; i < 32; ++i) {
        Shuffle& to = *static_cast<Shuffle*>(requests[i]);
        to.received = static_cast<const Shuffle*>(requests[to.source])->given;
    }
}

template <typename T>
DEVICE T shuffle(T value, int source_lane, SHELFKERN_LINE) {
    static_assert(sizeof(T) == 4, "a shuffle moves 4 bytes");
    Shuffle request{0, 0, source_lane & 31};
    memcpy(&request.given, &value, 4);
    emulation::collective("shuffle", &complete_shuffle, &request, line);
    memcpy(&value, &request.received, 4);
    return value;
}

template <typename T>
DEVICE T shuffle_xor(T value, int mask, SHELFKERN_LINE) {
    return shuffle(value, lane() ^ mask, line);
}

DEVICE std::string bytes_named(int bytes, const char* what) {
    return std::to_string(bytes) + " bytes of " + what;
}

// Checks an access of `n` elements at element i of `count`, which must be inside and aligned to its size.
DEVICE void check_access(const char* what, int64_t i, int64_t n, int64_t count, uintptr_t address, int bytes,
                         int line) {
    if (i < 0 || i + n > count) {
        emulation::report("accesses " + std::string(what) + " memory at element " + std::to_string(i) +
                              (n > 1 ? " to " + std::to_string(i + n - 1) : "") + ", it has " +
                              std::to_string(count),
                          line);
    }
    if (address % bytes != 0) {
        emulation::report("accesses " + bytes_named(bytes, what) + " memory at element " + std::to_string(i) +
                              ", whose address is no multiple of " + std::to_string(bytes),
                          line);
    }
}

template <typename T, bool kReadOnly>
class Pointer {
   public:
    using Value = std::remove_const_t<T>;

    Pointer() = default;
    Pointer(T* data, int64_t count, int64_t offset = 0) : data_(data), count_(count), offset_(offset) {}

    template <int N>
    Pack<Value, N> load_pack(int64_t i, SHELFKERN_LINE) const {
        Pack<Value, N> pack;
        memcpy(&pack, source(i, N, line), sizeof(pack));
        return pack;
    }

    template <int N>
    void store_pack(int64_t i, const Pack<Value, N>& pack, SHELFKERN_LINE) const {
        static_assert(!std::is_const_v<T>, "a const pointer");
        T* at = check(i, N, line);
        emulation::write_global(at, sizeof(pack), line);
        memcpy(at, &pack, sizeof(pack));
    }

    Value load(int64_t i, SHELFKERN_LINE) const { return load_pack<1>(i, line)[0]; }
    void store(int64_t i, Value value, SHELFKERN_LINE) const { store_pack(i, Pack<Value, 1>{{value}}, line); }
    Pointer operator+(int64_t offset) const { return {data_, count_, offset_ + offset}; }
    explicit operator bool() const { return data_ != nullptr; }

    // The address of n elements from i, checked as a read of these elements.
    T* source(int64_t i, int n, int line) const {
        T* at = check(i, n, line);
        if (!kReadOnly) emulation::read_global(at, n * static_cast<int>(sizeof(T)), line);
        return at;
    }

   private:
    T* check(int64_t i, int n, int line) const {
        T* at = data_ + offset_ + i;
        check_access(kReadOnly ? "weights'" : "global", offset_ + i, n, count_,
                     reinterpret_cast<uintptr_t>(at), n * static_cast<int>(sizeof(T)), line);
        return at;
    }

    T* data_ = nullptr;
    int64_t count_ = 0, offset_ = 0;
};

template <typename T>
using Global = Pointer<T, false>;
template <typename T>
using Weights = Pointer<const T, true>;

template <typename T>
Global<T> global(T* pointer, int64_t count) {
    return {pointer, count};
}

template <typename T>
Weights<T> weights(const T* pointer, int64_t count) {
    return {pointer, count};
}

template <typename T>
class Shared {
   public:
    Shared(int start, int count, int offset = 0) : start_(start), count_(count), offset_(offset) {}

    template <int N>
    Pack<T, N> load_pack(int i, SHELFKERN_LINE) const {
        const int64_t at = byte(i, N, line);
        Pack<T, N> pack;
        emulation::read_shared(at, sizeof(pack), line);
        memcpy(&pack, emulation::shared_memory + at, sizeof(pack));
        return pack;
    }

    template <int N>
    void store_pack(int i, const Pack<T, N>& pack, SHELFKERN_LINE) const {
        const int64_t at = byte(i, N, line);
        emulation::write_shared(at, sizeof(pack), line);
        memcpy(emulation::shared_memory + at, &pack, sizeof(pack));
    }

    T load(int i, SHELFKERN_LINE) const { return load_pack<1>(i, line)[0]; }
    void store(int i, T value, SHELFKERN_LINE) const { store_pack(i, Pack<T, 1>{{value}}, line); }
    Shared operator+(int offset) const { return {start_, count_, offset_ + offset}; }

    // The byte offset of n elements from i in the block's shared memory.
    int64_t byte(int64_t i, int n, int line) const {
        const int64_t element = offset_ + i, at = start_ + element * static_cast<int64_t>(sizeof(T));
        check_access("shared", element, n, count_, static_cast<uintptr_t>(at),
                     n * static_cast<int>(sizeof(T)), line);
        return at;
    }

   private:
    int start_, count_, offset_;  // bytes, elements, elements
};

template <typename T>
DEVICE Shared<T> shared(int byte_offset, int count, SHELFKERN_LINE) {
    emulation::check_window(byte_offset, int64_t{count} * static_cast<int64_t>(sizeof(T)), alignof(T), line);
    return {byte_offset, count};
}

template <typename T, typename U, bool kReadOnly>
DEVICE void cp_async_16(Shared<T> dst, Pointer<U, kReadOnly> src, bool valid, SHELFKERN_LINE) {
    constexpr int kTo = 16 / sizeof(T), kFrom = 16 / sizeof(U);
    emulation::start_copy(dst.byte(0, kTo, line), valid ? src.source(0, kFrom, line) : nullptr, line);
}

DEVICE void cp_async_commit() { emulation::commit_copies(); }

template <int kInFlight>
DEVICE void cp_async_wait(SHELFKERN_LINE) {
    emulation::wait_for_copies(kInFlight, line);
}

struct MatrixLoad {
    const unsigned char* row;
    uint32_t* r;
};

template <int kMatrices, bool kTrans>
DEVICE void complete_ldmatrix(void* const* requests) {
    const auto load = [&](int i) { return *static_cast<const MatrixLoad*>(requests[i]); };
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
        const unsigned char* rows[8];
        for (int j = 0; j < 8; ++j) rows[j] = load(8 * matrix + j).row;
        const auto element = [&](int row, int column) {
            uint16_t bits;
            memcpy(&bits, rows[row] + 2 * column, 2);
            return static_cast<uint32_t>(bits);
        };
        for (int i = 0; i < 32; ++i) {
            const int g = i / 4, t = i % 4;
            load(i).r[matrix] = kTrans ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                       : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
        emulation::count_bank_conflicts(rows);
    }
}

template <int kMatrices, bool kTrans, typename T>
DEVICE void ldmatrix(uint32_t* r, Shared<T> row, int line) {
    MatrixLoad request{nullptr, r};
    if (lane() < 8 * kMatrices) {
        const int64_t at = row.byte(0, 16 / sizeof(T), line);
        emulation::read_shared_by_warp(at, 16, line);
        request.row = emulation::shared_memory + at;
    }
    emulation::collective("ldmatrix", &complete_ldmatrix<kMatrices, kTrans>, &request, line);
}

template <typename T>
DEVICE void ldmatrix_x4(uint32_t (&r)[4], Shared<T> row, SHELFKERN_LINE) {
    ldmatrix<4, false>(r, row, line);
}

template <typename T>
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], Shared<T> row, SHELFKERN_LINE) {
    ldmatrix<4, true>(r, row, line);
}

template <typename T>
DEVICE void ldmatrix_x2(uint32_t (&r)[2], Shared<T> row, SHELFKERN_LINE) {
    ldmatrix<2, false>(r, row, line);
}

template <typename T>
DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], Shared<T> row, SHELFKERN_LINE) {
    ldmatrix<2, true>(r, row, line);
}

struct MatrixProduct {
    float* d;
    const uint32_t *a, *b;
};

// Sums in double: the order and precision of the hardware's accumulation are not documented.
template <typename T>
DEVICE void complete_mma(void* const* requests) {
    double a[16][16], b[16][8], d[16][8];
    for (int i = 0; i < 32; ++i) {
        const MatrixProduct& lane = *static_cast<const MatrixProduct*>(requests[i]);
        const int g = i / 4, t = i % 4;
        for (int k = 0; k < 2; ++k) {
            for (int r = 0; r < 4; ++r) {
                a[g + r % 2 * 8][2 * t + k + r / 2 * 8] = unpack2<T>(lane.a[r])[k];
            }
            for (int r = 0; r < 2; ++r) b[2 * t + k + 8 * r][g] = unpack2<T>(lane.b[r])[k];
            for (int r = 0; r < 2; ++r) d[g + 8 * r][2 * t + k] = lane.d[2 * r + k];
        }
    }
    for (int i = 0; i < 16; ++i) {
        for (int k = 0; k < 16; ++k) {
            for (int j = 0; j < 8; ++j) d[i][j] += a[i][k] * b[k][j];
        }
    }
    for (int i = 0; i < 32; ++i) {
        float* out = static_cast<const MatrixProduct*>(requests[i])->d;
        for (int k = 0; k < 4; ++k) out[k] = static_cast<float>(d[i / 4 + k / 2 * 8][i % 4 * 2 + k % 2]);
    }
    ++emulation::statistics.mma;
}

template <typename T>
DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SHELFKERN_LINE) {
    static_assert(std::is_same_v<T, BF16> || std::is_same_v<T, F16>, "tensor cores take BF16 or F16");
    MatrixProduct request{d, a, b};
    emulation::collective("mma", &complete_mma<T>, &request, line);
}

DEVICE int opaque(int value) { return value; }
DEVICE void wait_for_previous() { emulation::wait_for_previous(); }
DEVICE void release_next() {}

template <typename Args>
void launch(void (*kernel)(Args), const Launch& launch, const Grid& grid, const Args& args) {
    if (grid.empty()) return;
    check_grid(launch, grid);
    using Call = std::pair<void (*)(Args), const Args*>;
    const Call call{kernel, &args};
    const auto thread = [](const void* given) {
        const Call& call = *static_cast<const Call*>(given);
        call.first(*call.second);
    };
    emulation::run(
        {launch.name, grid.x, grid.y, grid.z, launch.threads, launch.shared_bytes, launch.stream.overlap},
        thread, &call);
}

}  // namespace cuda
}  // namespace shelfkern

#undef SHELFKERN_LINE
