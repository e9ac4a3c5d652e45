// Fortified longjmp treats a jump to another stack as an error.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define __SANITIZE_ADDRESS__ 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace shelfkern {
namespace emulation {

Position position;
Statistics statistics;
unsigned char* shared_memory;

namespace {

constexpr int kWarp = 32, kMaxThreads = 1024, kMaxSharedBytes = 227 * 1024;
// All ones: NaN in every floating format.
constexpr unsigned char kPoison = 0xff;

std::string str(int64_t n) { return std::to_string(n); }

// Randomness.

// splitmix64.
struct Random {
    uint64_t state = 0;

    uint64_t operator()() {
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
        z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
        return z ^ (z >> 31);
    }

    size_t below(size_t n) { return static_cast<size_t>((*this)() % n); }
};

Random random;

// Fibers.

// A stack and the point where its execution was left. The launching thread's stack is a Fiber as well.
class Fiber {
   public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;

    ~Fiber() {
        if (stack_) munmap(stack_, kStack + kGuard);
    }

    // The next switch here calls body() on the fiber's own stack; body never returns.
    void prepare(void (*body)()) {
        if (!stack_) allocate();
#if defined(__SANITIZE_ADDRESS__)
        // Frames of an abandoned launch are still marked.
        ASAN_UNPOISON_MEMORY_REGION(stack_ + kGuard, kStack);
        bottom_ = stack_ + kGuard;
        size_ = kStack;
#endif
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_ + kGuard;
        context_.uc_stack.ss_size = kStack;
        context_.uc_link = nullptr;
        makecontext(&context_, body, 0);
        fresh_ = true;
    }

    void switch_to(Fiber& to) {
        void* fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fake_stack, to.bottom_, to.size_);
        from_ = this;
#endif
        // Unlike swapcontext, jumps make no system call.
        if (_setjmp(jump_) == 0) {
            if (!to.fresh_) _longjmp(to.jump_, 1);
            to.fresh_ = false;
            setcontext(&to.context_);
        }
        arrived(fake_stack);
    }

    // The first call after a switch.
    static void arrived([[maybe_unused]] void* fake_stack = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, &from_->bottom_, &from_->size_);
#endif
    }

   private:
    // Optimised frames are small, those of a sanitizer build are not.
#if defined(__SANITIZE_ADDRESS__)
    static constexpr size_t kStack = 512 * 1024;
#else
    static constexpr size_t kStack = 128 * 1024;
#endif
    static constexpr size_t kGuard = 4096;

    void allocate() {
        void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        stack_ = static_cast<unsigned char*>(memory);
        mprotect(stack_, kGuard, PROT_NONE);
    }

    unsigned char* stack_ = nullptr;
    ucontext_t context_;
    bool fresh_ = false;
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom_ = nullptr;
    size_t size_ = 0;
    static inline Fiber* from_ = nullptr;
#endif
    jmp_buf jump_;
};

// The state of a launch.

struct Copy {
    int64_t byte, group;
    unsigned char data[16];
};

struct Thread {
    Fiber fiber;
    bool finished = false, previous_done = false;
    // Name of the primitive it waits at; null while it may run.
    const char* waits_at = nullptr;
    int line = 0;
    void* request = nullptr;
    std::vector<Copy> copies;
    int64_t groups = 0;
};

struct Warp {
    // Lanes that wait at a collective, and line and thread of the first of them.
    int arrived = 0, line = 0, thread = 0;
    const char* name = nullptr;
    Complete complete = nullptr;
    // Number of warp barriers.
    uint32_t epoch = 0;
};

// The last accesses to a byte of shared memory. Epochs count barriers: of the block, since the launch began.
struct SharedByte {
    uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
    // Two readers represent all of an epoch: of two warps, or of the latest warp epoch of one.
    uint16_t writer, reader, other_reader;
    uint16_t copier;  // 1 + the thread whose copy has not landed
    int write_line, read_line;
};

// The accesses to each byte of 4 KiB of global memory: 1 + the thread's number in the grid, 0 for none.
struct Page {
    static constexpr int kBytes = 4096;
    uint32_t writer[kBytes], reader[kBytes], other_reader[kBytes];
};

struct State {
    Grid grid;
    void (*thread)(const void*);
    const void* arguments;

    Fiber main;
    std::vector<std::unique_ptr<Thread>> threads;
    std::vector<Warp> warps;
    std::vector<int> runnable;
    int at_barrier, barrier_line, barrier_thread;
    uint32_t epoch, first_epoch;
    uint32_t first_number;  // of the block's threads in the grid
    std::exception_ptr failure;

    std::vector<SharedByte> shared;
    std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
    // The pages of the latest accesses.
    struct {
        uintptr_t index;
        Page* page;
    } recent[64];
};

State state;
std::mutex one_launch;

Thread& here() { return *state.threads[position.thread]; }
Warp& warp_of(int thread) { return state.warps[thread / kWarp]; }

std::string block_name(int64_t x, int64_t y, int64_t z) {
    return "block (" + str(x) + ", " + str(y) + ", " + str(z) + ")";
}

std::string at_line(int line) { return line ? " (line " + str(line) + ")" : ""; }

// Scheduling.

void enter(int thread) { position.thread = thread; }

// Switches from the running thread to a random one that may run, or to the launch if there is none.
void yield() {
    Thread& self = here();
    if (state.runnable.empty()) {
        self.fiber.switch_to(state.main);
        return;
    }
    const size_t pick = random.below(state.runnable.size());
    const int next = std::exchange(state.runnable[pick], state.runnable.back());
    state.runnable.pop_back();
    if (next == position.thread) return;
    enter(next);
    self.fiber.switch_to(state.threads[next]->fiber);
}

void wait_at(const char* name, int line) {
    here().waits_at = name;
    here().line = line;
    yield();
}

void resume(int thread) {
    state.threads[thread]->waits_at = nullptr;
    state.runnable.push_back(thread);
}

void finish_thread() {
    Thread& self = here();
    if (!self.copies.empty()) {
        report("ends with an asynchronous copy to shared byte " + str(self.copies.front().byte) +
                   " that it never waited for",
               0);
    }
    self.finished = true;
}

// Body of every fiber: runs one thread of one block after another.
void run_threads() {
    Fiber::arrived();
    for (;;) {
        try {
            state.thread(state.arguments);
            finish_thread();
        } catch (...) {
            state.failure = std::current_exception();
        }
        if (state.failure) state.runnable.clear();
        yield();
    }
}

// Blocks and launches.

// Reports in one sentence the threads that wait forever.
[[noreturn]] void report_deadlock() {
    const auto waits_at = [](int t) { return state.threads[t]->waits_at; };
    const auto state_of = [&](int t) {
        return "thread " + str(t) +
               (waits_at(t) ? " waits at " + std::string(waits_at(t)) + at_line(state.threads[t]->line)
                            : " has ended");
    };
    int first = 0, last = state.grid.threads;
    while (!waits_at(first)) ++first;
    // A collective with missing lanes explains a barrier with missing threads.
    for (int t = first; t < last; ++t) {
        if (waits_at(t) && warp_of(t).arrived) {
            first = t;
            break;
        }
    }
    std::string group = "of the block";
    int begin = 0;
    if (warp_of(first).arrived && std::strcmp(waits_at(first), "barrier") != 0) {
        begin = first / kWarp * kWarp;
        last = begin + kWarp;
        group = "of its warp";
    }
    const Thread& waiting = *state.threads[first];
    int arrived = 0, other = -1;
    for (int t = begin; t < last; ++t) {
        const bool same = waits_at(t) && std::strcmp(waits_at(t), waiting.waits_at) == 0;
        arrived += same;
        if (!same && other < 0) other = t;
    }
    position.thread = first;
    report("waits at " + std::string(waiting.waits_at) + " with " + str(arrived) + " of the " +
               str(last - begin) + " threads " + group + ", but " + state_of(other),
           waiting.line);
}

void begin_block(int64_t index) {
    const Grid& grid = state.grid;
    position.block_x = index % grid.x;
    position.block_y = index / grid.x % grid.y;
    position.block_z = index / grid.x / grid.y;
    state.first_number = static_cast<uint32_t>(index * grid.threads) + 1;
    state.first_epoch = ++state.epoch;
    state.at_barrier = 0;
    state.runnable.resize(grid.threads);
    std::iota(state.runnable.begin(), state.runnable.end(), 0);
    for (int i = 0; i < grid.threads; ++i) {
        Thread& thread = *state.threads[i];
        thread.finished = false;
        thread.previous_done = !grid.overlap;
        thread.groups = 0;
    }
    std::memset(shared_memory, kPoison, grid.shared_bytes);
}

void run_block(int64_t index) {
    begin_block(index);
    const size_t pick = random.below(state.runnable.size());
    const int first = std::exchange(state.runnable[pick], state.runnable.back());
    state.runnable.pop_back();
    enter(first);
    state.main.switch_to(state.threads[first]->fiber);
    if (state.failure) std::rethrow_exception(state.failure);
    for (int i = 0; i < state.grid.threads; ++i) {
        if (!state.threads[i]->finished) report_deadlock();
    }
}

void check_launch(const Grid& grid) {
    const auto refuse = [&](const std::string& what) { throw std::runtime_error(grid.name + ": " + what); };
    if (grid.threads < kWarp || grid.threads > kMaxThreads || grid.threads % kWarp != 0) {
        refuse("a block has " + str(grid.threads) + " threads, it may have a multiple of 32 up to 1024");
    }
    if (grid.shared_bytes < 0 || grid.shared_bytes > kMaxSharedBytes) {
        refuse("a block has " + str(grid.shared_bytes) + " bytes of shared memory, it may have " +
               str(kMaxSharedBytes));
    }
    if (grid.x * grid.y * grid.z >= (int64_t{1} << 32) / grid.threads) {
        refuse("the grid has 2^32 threads or more, the emulator numbers fewer");
    }
}

void begin_launch(const Grid& grid) {
    alignas(128) static unsigned char memory[kMaxSharedBytes];
    shared_memory = memory;
    state.grid = grid;
    state.failure = nullptr;
    state.epoch = 0;
    state.shared.assign(grid.shared_bytes, SharedByte{});
    state.pages.clear();
    for (auto& recent : state.recent) recent.page = nullptr;
    state.warps.assign(grid.threads / kWarp, Warp{});
    position = {0, 0, 0, 0, grid.x, grid.y, grid.z};
    while (state.threads.size() < static_cast<size_t>(grid.threads)) {
        state.threads.push_back(std::make_unique<Thread>());
        state.threads.back()->fiber.prepare(&run_threads);
    }
    ++statistics.launches;
    statistics.shared_bytes = std::max<int64_t>(statistics.shared_bytes, grid.shared_bytes);
}

// Threads of an abandoned launch are in the middle of the kernel: the next launch starts them anew.
void abandon_threads() {
    for (auto& thread : state.threads) {
        thread->copies.clear();
        thread->waits_at = nullptr;
        thread->fiber.prepare(&run_threads);
    }
}

}  // namespace

void set_seed(uint64_t seed) {
    const std::lock_guard<std::mutex> lock(one_launch);
    random.state = seed;
}

void run(const Grid& grid, void (*thread)(const void*), const void* arguments) {
    const std::lock_guard<std::mutex> lock(one_launch);
    check_launch(grid);
    begin_launch(grid);
    state.thread = thread;
    state.arguments = arguments;
    std::vector<int64_t> blocks(grid.x * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), int64_t{0});
    for (size_t i = blocks.size(); i > 1; --i) std::swap(blocks[i - 1], blocks[random.below(i)]);
    try {
        for (const int64_t block : blocks) run_block(block);
    } catch (...) {
        abandon_threads();
        throw;
    }
}

void report(const std::string& what, int line) {
    throw std::runtime_error(state.grid.name + ": " +
                             block_name(position.block_x, position.block_y, position.block_z) + ", thread " +
                             str(position.thread) + at_line(line) + " " + what);
}

// Barriers and collectives.

void barrier(int line) {
    if (state.at_barrier == 0) {
        state.barrier_line = line;
        state.barrier_thread = position.thread;
    } else if (state.barrier_line != line) {
        report("waits at a barrier, but thread " + str(state.barrier_thread) + " waits at another" +
                   at_line(state.barrier_line),
               line);
    }
    if (++state.at_barrier < state.grid.threads) return wait_at("barrier", line);
    state.at_barrier = 0;
    ++state.epoch;
    ++statistics.barriers;
    for (int i = 0; i < state.grid.threads; ++i) resume(i);
    yield();
}

void collective(const char* name, Complete complete, void* request, int line) {
    const int first = position.thread / kWarp * kWarp;
    Warp& warp = warp_of(first);
    here().request = request;
    if (warp.arrived == 0) {
        warp.complete = complete;
        warp.name = name;
        warp.line = line;
        warp.thread = position.thread;
    } else if (warp.complete != complete || warp.line != line) {
        report("is at " + std::string(name) + ", but thread " + str(warp.thread) + " of its warp waits at " +
                   warp.name + at_line(warp.line),
               line);
    }
    if (++warp.arrived < kWarp) return wait_at(name, line);
    warp.arrived = 0;
    void* requests[kWarp];
    for (int i = 0; i < kWarp; ++i) requests[i] = state.threads[first + i]->request;
    complete(requests);
    for (int i = 0; i < kWarp; ++i) resume(first + i);
    yield();
}

void warp_barrier(int line) {
    collective("warp_barrier", [](void* const*) { ++warp_of(position.thread).epoch; }, nullptr, line);
}

// Shared memory.

namespace {

[[noreturn]] void report_race(const char* does, int64_t byte, int other, const char* did, int other_line,
                              int line) {
    report(std::string(does) + " shared byte " + str(byte) + ", which thread " + str(other) + " " + did +
               at_line(other_line) + " with no barrier between",
           line);
}

[[noreturn]] void report_copying(const char* does, int64_t byte, int copier, int line) {
    report(std::string(does) + " shared byte " + str(byte) + " while an asynchronous copy of thread " +
               str(copier) + " may be writing it",
           line);
}

// Whether another thread's access in this epoch and warp epoch is not ordered with this thread's.
bool unordered(int other, uint32_t warp_epoch) {
    return other / kWarp != position.thread / kWarp || warp_epoch == warp_of(position.thread).epoch;
}

void check_read(const SharedByte& at, int64_t byte, bool by_warp, int line) {
    if (at.copier) report_copying("reads", byte, at.copier - 1, line);
    if (at.write_epoch < state.first_epoch) {
        report("reads shared byte " + str(byte) + " before anything was written there", line);
    }
    const bool other = by_warp || at.writer != position.thread;
    if (at.write_epoch == state.epoch && other && unordered(at.writer, at.write_warp_epoch)) {
        report_race("reads", byte, at.writer, "wrote", at.write_line, line);
    }
}

void record_read(SharedByte& at, int thread, int line) {
    const uint32_t warp_epoch = warp_of(thread).epoch;
    if (at.read_epoch == state.epoch && at.reader / kWarp != at.other_reader / kWarp) return;
    const bool same_warp = at.reader / kWarp == thread / kWarp;
    if (at.read_epoch != state.epoch || (same_warp && at.read_warp_epoch != warp_epoch)) {
        at.reader = static_cast<uint16_t>(thread);
        at.read_epoch = state.epoch;
        at.read_warp_epoch = warp_epoch;
    } else if (at.reader == thread) {
        return;
    }
    at.other_reader = static_cast<uint16_t>(thread);
    at.read_line = line;
}

void check_write(const SharedByte& at, int64_t byte, int line) {
    if (at.copier) report_copying("writes", byte, at.copier - 1, line);
    if (at.write_epoch == state.epoch && at.writer != position.thread &&
        unordered(at.writer, at.write_warp_epoch)) {
        report_race("writes", byte, at.writer, "wrote", at.write_line, line);
    }
    if (at.read_epoch != state.epoch) return;
    for (const int reader : {at.reader, at.other_reader}) {
        if (reader != position.thread && unordered(reader, at.read_warp_epoch)) {
            report_race("writes", byte, reader, "read", at.read_line, line);
        }
    }
}

void record_write(SharedByte& at, int line) {
    at.write_epoch = state.epoch;
    at.write_warp_epoch = warp_of(position.thread).epoch;
    at.writer = static_cast<uint16_t>(position.thread);
    at.write_line = line;
}

}  // namespace

void check_window(int64_t start, int64_t bytes, int alignment, int line) {
    if (start < 0 || bytes < 0 || start + bytes > state.grid.shared_bytes) {
        report("takes bytes " + str(start) + " to " + str(start + bytes) + " of shared memory, it has " +
                   str(state.grid.shared_bytes),
               line);
    }
    if (start % alignment != 0) {
        report("takes shared memory from byte " + str(start) + ", no multiple of " + str(alignment), line);
    }
}

void read_shared(int64_t byte, int bytes, int line) {
    for (int64_t i = byte; i < byte + bytes; ++i) {
        SharedByte& at = state.shared[i];
        check_read(at, i, false, line);
        record_read(at, position.thread, line);
    }
}

void read_shared_by_warp(int64_t byte, int bytes, int line) {
    for (int64_t i = byte; i < byte + bytes; ++i) {
        SharedByte& at = state.shared[i];
        check_read(at, i, true, line);
        // Two lanes represent all.
        record_read(at, position.thread, line);
        record_read(at, position.thread ^ 1, line);
    }
}

void write_shared(int64_t byte, int bytes, int line) {
    for (int64_t i = byte; i < byte + bytes; ++i) {
        SharedByte& at = state.shared[i];
        check_write(at, i, line);
        record_write(at, line);
    }
}

void count_bank_conflicts(const unsigned char* const (&rows)[8]) {
    // A wavefront accesses each bank once; a row of 16 bytes takes four of the 32 banks.
    int wavefronts = 1;
    for (int i = 0; i < 8; ++i) {
        int sharing = 1;
        for (int j = 0; j < i; ++j) sharing += rows[j] != rows[i] && (rows[j] - rows[i]) % 128 == 0;
        wavefronts = std::max(wavefronts, sharing);
    }
    statistics.bank_conflicts += wavefronts - 1;
}

// Asynchronous copies.

void start_copy(int64_t byte, const void* source, int line) {
    for (int64_t i = byte; i < byte + 16; ++i) {
        check_write(state.shared[i], i, line);
        state.shared[i].copier = static_cast<uint16_t>(position.thread + 1);
    }
    Copy copy{byte, here().groups, {}};
    if (source) std::memcpy(copy.data, source, 16);
    here().copies.push_back(copy);
}

void commit_copies() { ++here().groups; }

void wait_for_copies(int in_flight, int line) {
    std::vector<Copy>& copies = here().copies;
    const int64_t landed = here().groups - in_flight;
    const auto end =
        std::find_if(copies.begin(), copies.end(), [&](const Copy& copy) { return copy.group >= landed; });
    for (auto copy = copies.begin(); copy != end; ++copy) {
        std::memcpy(shared_memory + copy->byte, copy->data, 16);
        for (int64_t i = copy->byte; i < copy->byte + 16; ++i) {
            state.shared[i].copier = 0;
            record_write(state.shared[i], line);
        }
    }
    copies.erase(copies.begin(), end);
}

// Global memory.

namespace {

Page& page_of(uintptr_t address) {
    const uintptr_t index = address / Page::kBytes;
    auto& recent = state.recent[index % std::size(state.recent)];
    if (!recent.page || recent.index != index) {
        std::unique_ptr<Page>& page = state.pages[index];
        if (!page) page = std::make_unique<Page>();
        recent = {index, page.get()};
    }
    return *recent.page;
}

[[noreturn]] void report_global_race(const char* does, uintptr_t address, uint32_t other, const char* did,
                                     int line) {
    const Grid& grid = state.grid;
    const int64_t number = other - 1, block = number / grid.threads;
    report(std::string(does) + " global memory that thread " + str(number % grid.threads) + " of " +
               block_name(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y) + " " + did +
               " in this launch, at address " + str(static_cast<int64_t>(address)),
           line);
}

void check_previous(int line) {
    if (!here().previous_done) report("accesses global memory before wait_for_previous()", line);
}

}  // namespace

void read_global(const void* address, int bytes, int line) {
    check_previous(line);
    const uintptr_t start = reinterpret_cast<uintptr_t>(address);
    const uint32_t self = state.first_number + static_cast<uint32_t>(position.thread);
    Page& page = page_of(start);
    for (uintptr_t i = start % Page::kBytes, end = i + bytes; i < end; ++i) {
        const uint32_t writer = page.writer[i];
        if (writer && writer != self) {
            report_global_race("reads", start / Page::kBytes * Page::kBytes + i, writer, "wrote", line);
        }
        if (!page.reader[i]) {
            page.reader[i] = self;
        } else if (page.reader[i] != self) {
            page.other_reader[i] = self;
        }
    }
    statistics.global_bytes_read += bytes;
}

void write_global(const void* address, int bytes, int line) {
    check_previous(line);
    const uintptr_t start = reinterpret_cast<uintptr_t>(address);
    const uint32_t self = state.first_number + static_cast<uint32_t>(position.thread);
    Page& page = page_of(start);
    for (uintptr_t i = start % Page::kBytes, end = i + bytes; i < end; ++i) {
        const uintptr_t byte = start / Page::kBytes * Page::kBytes + i;
        if (page.writer[i] && page.writer[i] != self) {
            report_global_race("writes", byte, page.writer[i], "wrote", line);
        }
        for (const uint32_t reader : {page.reader[i], page.other_reader[i]}) {
            if (reader && reader != self) report_global_race("writes", byte, reader, "read", line);
        }
        page.writer[i] = self;
    }
    statistics.global_bytes_written += bytes;
}

void wait_for_previous() { here().previous_done = true; }

}  // namespace emulation
}  // namespace shelfkern
