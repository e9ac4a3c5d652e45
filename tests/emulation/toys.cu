// Small kernels with planted bugs, for the tests of the emulator. Each bug is a variant of its kernel.
#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "../../csrc/cuda/primitives.cuh"

namespace shelfkern {
namespace cuda {
namespace {

enum class Bug {
    none,
    no_barrier_after_copy,
    no_barrier_before_reuse,
    no_wait,
    waits_for_too_few,
    never_waited_for,
    wrong_fragment,
    no_barrier,
    short_halo,
    uninitialised,
    reads_past_the_end,
    writes_past_the_end,
    overlapping_blocks,
    reads_a_neighbours_output,
    divergent_barrier,
    early_exit,
    divergent_shuffle,
    barrier_in_both_branches,
    no_warp_barrier,
    reads_too_early,
    misaligned_pack,
    window_too_large,
    count
};

// c = a @ b in tiles of 32 x 32, double buffered. a: m x k, b: k x n, row major; k and n multiples of 8.
struct Matmul {
    Global<const BF16> a;
    Weights<BF16> b;
    Global<float> c;
    int m, n, k;
};

constexpr int kTile = 32, kPitch = kTile + 8, kMatmulThreads = 64;
constexpr int kBuffer = kTile * kPitch;  // elements

template <typename Source>
DEVICE void copy_tile(Shared<BF16> to, Source from, int row, int column, int rows, int columns) {
    for (int i = thread_index(); i < kTile * kTile / 8; i += kMatmulThreads) {
        const int y = i / 4, x = i % 4 * 8;
        const bool valid = row + y < rows && column + x < columns;
        cp_async_16(to + (y * kPitch + x), from + (int64_t{row + y} * columns + column + x), valid);
    }
}

template <Bug kBug>
DEVICE void multiply_tile(Shared<BF16> a, Shared<BF16> b, float (&sums)[4][4]) {
    for (int k = 0; k < kTile; k += 16) {
        uint32_t a_part[4], b_part[4][2];
        ldmatrix_x4(a_part, a + ((warp() * 16 + lane() % 16) * kPitch + k + lane() / 16 * 8));
        for (int j = 0; j < 4; ++j) ldmatrix_x2_trans(b_part[j], b + ((k + lane() % 16) * kPitch + j * 8));
        if (kBug == Bug::wrong_fragment) std::swap(a_part[1], a_part[2]);
        for (int j = 0; j < 4; ++j) mma_m16n8k16<BF16>(sums[j], a_part, b_part[j]);
    }
}

template <Bug kBug>
KERNEL(kMatmulThreads)
matmul_kernel(const Matmul args) {
    if (kBug != Bug::reads_too_early) wait_for_previous();
    const Shared<BF16> a = shared<BF16>(0, 2 * kBuffer);
    const Shared<BF16> b = shared<BF16>(4 * kBuffer, 2 * kBuffer);
    const int row = block_index_y() * kTile, column = block_index_x() * kTile;
    const auto copy = [&](int k) {
        const int buffer = k / kTile % 2 * kBuffer;
        copy_tile(a + buffer, args.a, row, k, args.m, args.k);
        copy_tile(b + buffer, args.b, k, column, args.k, args.n);
    };
    float sums[4][4] = {};
    copy(0);
    cp_async_commit();
    for (int k = 0; k < args.k; k += kTile) {
        if (k + kTile < args.k) copy(k + kTile);
        cp_async_commit();
        if (kBug == Bug::waits_for_too_few) {
            cp_async_wait<2>();
        } else if (kBug != Bug::no_wait) {
            cp_async_wait<1>();
        }
        if (kBug != Bug::no_barrier_after_copy) barrier();
        const int buffer = k / kTile % 2 * kBuffer;
        multiply_tile<kBug>(a + buffer, b + buffer, sums);
        if (kBug != Bug::no_barrier_before_reuse) barrier();
    }
    if (kBug == Bug::never_waited_for) copy(0);
    for (int j = 0; j < 4; ++j) {
        for (int i = 0; i < 4; ++i) {
            const int y = row + warp() * 16 + lane() / 4 + i / 2 * 8;
            const int x = column + j * 8 + lane() % 4 * 2 + i % 2;
            if (y < args.m && x < args.n) args.c.store(int64_t{y} * args.n + x, sums[j][i]);
        }
    }
}

// out[i] = x[i - 1] + x[i] + x[i + 1], zeros beyond; and the block's own sum over its warps.
struct Stencil {
    Global<const float> x;
    Global<float> out, sums;
    int count;
};

constexpr int kStencilThreads = 128;

template <Bug kBug>
KERNEL(kStencilThreads)
stencil_kernel(const Stencil args) {
    if (kBug == Bug::early_exit && thread_index() == 77) return;
    if (kBug != Bug::reads_too_early) wait_for_previous();
    const int start = block_index_x() * kStencilThreads, i = start + thread_index();
    const int window = kBug == Bug::window_too_large ? 200 : kStencilThreads + 2;
    const Shared<float> tile = shared<float>(0, window);
    const Shared<float> warp_sums = shared<float>(4 * (kStencilThreads + 2), kStencilThreads / 32);

    const auto at = [&](int j) { return j >= 0 && j < args.count ? args.x.load(j) : 0.0f; };
    const int halo = kBug == Bug::short_halo ? 1 : 2;
    for (int j = thread_index(); j < kStencilThreads + halo; j += kStencilThreads) {
        if (kBug == Bug::uninitialised && j == 5) continue;
        tile.store(j, kBug == Bug::reads_past_the_end ? args.x.load(start + j) : at(start + j - 1));
    }
    if (kBug == Bug::divergent_barrier) {
        if (thread_index() < 64) barrier();
    } else if (kBug == Bug::barrier_in_both_branches) {
        if (thread_index() < 64) {
            barrier();
        } else {
            barrier();
        }
    } else if (kBug != Bug::no_barrier) {
        barrier();
    }
    const int from = thread_index();
    const float sum = tile.load(from) + tile.load(from + 1) + tile.load(from + 2);
    if (kBug == Bug::misaligned_pack) tile.load_pack<4>(1);
    const int to = kBug == Bug::overlapping_blocks ? std::max(i - 1, 0) : i;
    if (to < args.count || kBug == Bug::writes_past_the_end) args.out.store(to, sum);
    if (kBug == Bug::reads_a_neighbours_output && i > 0 && i < args.count) args.out.load(i - 1);

    float total = i < args.count ? sum : 0.0f;
    for (int mask = 16; mask > 0; mask /= 2) {
        if (kBug == Bug::divergent_shuffle && lane() == 3 && mask == 4) break;
        total += shuffle_xor(total, mask);
    }
    if (lane() == 0) warp_sums.store(warp(), total);
    if (kBug == Bug::no_warp_barrier && lane() == 1) warp_sums.load(warp());
    barrier();
    if (thread_index() == 0) {
        for (int j = 1; j < kStencilThreads / 32; ++j) total += warp_sums.load(j);
        args.sums.store(block_index_x(), total);
    }
}

// What each lane holds after ldmatrix of 32 rows of 16 bytes: x4, x4_trans, x2, x2_trans; 12 registers.
// Lane i gives row (i * step) % 32, so that one warp shows any order of rows; pitch in elements.
struct Fragments {
    Global<const uint16_t> rows;
    Global<uint32_t> registers;
    int pitch;
};

KERNEL(32) fragments_kernel(const Fragments args) {
    const Shared<uint16_t> rows = shared<uint16_t>(0, 32 * args.pitch);
    for (int i = 0; i < 8; ++i) rows.store(lane() * args.pitch + i, args.rows.load(lane() * 8 + i));
    warp_barrier();
    uint32_t x4[4], x4_trans[4], x2[2], x2_trans[2];
    const Shared<uint16_t> row = rows + lane() * args.pitch;
    ldmatrix_x4(x4, row);
    ldmatrix_x4_trans(x4_trans, row);
    ldmatrix_x2(x2, row);
    ldmatrix_x2_trans(x2_trans, row);
    for (int i = 0; i < 4; ++i) args.registers.store(lane() * 12 + i, x4[i]);
    for (int i = 0; i < 4; ++i) args.registers.store(lane() * 12 + 4 + i, x4_trans[i]);
    for (int i = 0; i < 2; ++i) args.registers.store(lane() * 12 + 8 + i, x2[i]);
    for (int i = 0; i < 2; ++i) args.registers.store(lane() * 12 + 10 + i, x2_trans[i]);
}

// One mma on registers as they are: a 32 x 4, b 32 x 2, d 32 x 4, by lane.
struct Product {
    Global<const uint32_t> a, b;
    Global<float> d;
};

template <typename T>
KERNEL(32)
product_kernel(const Product args) {
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = args.a.load(lane() * 4 + i);
    for (int i = 0; i < 2; ++i) b[i] = args.b.load(lane() * 2 + i);
    for (int i = 0; i < 4; ++i) d[i] = args.d.load(lane() * 4 + i);
    mma_m16n8k16<T>(d, a, b);
    for (int i = 0; i < 4; ++i) args.d.store(lane() * 4 + i, d[i]);
}

template <size_t... kBugs>
auto matmul_variants(std::index_sequence<kBugs...>) {
    return std::array<void (*)(Matmul), sizeof...(kBugs)>{&matmul_kernel<static_cast<Bug>(kBugs)>...};
}

template <size_t... kBugs>
auto stencil_variants(std::index_sequence<kBugs...>) {
    return std::array<void (*)(Stencil), sizeof...(kBugs)>{&stencil_kernel<static_cast<Bug>(kBugs)>...};
}

using Bugs = std::make_index_sequence<static_cast<size_t>(Bug::count)>;

// The message of what run() throws, null if nothing: for ctypes.
template <typename Run>
const char* message_of(const Run& run) {
    static std::string message;
    try {
        run();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

}  // namespace
}  // namespace cuda
}  // namespace shelfkern

using namespace shelfkern;
using namespace shelfkern::cuda;

extern "C" {

void set_seed(uint64_t seed) { emulation::set_seed(seed); }

// launches, barriers, global bytes read and written, mma, bank conflicts, shared bytes; then zero.
void take_statistics(int64_t* seven) {
    static_assert(sizeof(emulation::Statistics) == 7 * sizeof(int64_t));
    memcpy(seven, &emulation::statistics, sizeof(emulation::Statistics));
    emulation::statistics = {};
}

const char* matmul(int bug, const BF16* a, const BF16* b, float* c, int m, int n, int k) {
    return message_of([&] {
        const Matmul args{
            global(a, int64_t{m} * k), weights(b, int64_t{k} * n), global(c, int64_t{m} * n), m, n, k};
        launch(matmul_variants(Bugs{})[bug], {"matmul", kMatmulThreads, 8 * kBuffer, {nullptr, true}},
               {ceil_div(n, kTile), ceil_div(m, kTile)}, args);
    });
}

const char* stencil(int bug, const float* x, float* out, float* sums, int count) {
    return message_of([&] {
        const int64_t blocks = ceil_div(count, kStencilThreads);
        const Stencil args{global(x, count), global(out, count), global(sums, blocks), count};
        const int shared_bytes = 4 * (kStencilThreads + 2 + kStencilThreads / 32);
        launch(stencil_variants(Bugs{})[bug], {"stencil", kStencilThreads, shared_bytes, {nullptr, true}},
               {blocks}, args);
    });
}

const char* fragments(const uint16_t* rows, uint32_t* registers, int pitch) {
    return message_of([&] {
        const Fragments args{global(rows, 32 * 8), global(registers, 32 * 12), pitch};
        launch(fragments_kernel, {"fragments", 32, 64 * pitch}, {1}, args);
    });
}

const char* product(bool f16, const uint32_t* a, const uint32_t* b, float* d) {
    return message_of([&] {
        const Product args{global(a, 32 * 4), global(b, 32 * 2), global(d, 32 * 4)};
        launch(f16 ? product_kernel<F16> : product_kernel<BF16>, {"product", 32}, {1}, args);
    });
}

// A launch of an empty kernel with these limits.
const char* shape(int threads, int shared_bytes, int64_t x, int64_t y, int64_t z) {
    return message_of([&] { launch(+[](int) {}, {"shape", threads, shared_bytes}, {x, y, z}, 0); });
}
}
