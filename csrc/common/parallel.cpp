#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace shelfkern {
namespace {

std::atomic<OpenMPParallel> runtime{nullptr};

// Threads of all calls that are at work now.
std::atomic<int> at_work{0};

// A caller's place among them, and as many other threads as leave `wanted` at work in all: calls side by
// side share the cores, where each with threads of its own would make the others wait.
class Places {
   public:
    explicit Places(int wanted) {
        int present = at_work.load(std::memory_order_relaxed);
        do {
            threads_ = std::max(1, wanted - present);
        } while (!at_work.compare_exchange_weak(present, present + threads_, std::memory_order_relaxed));
    }
    ~Places() { at_work.fetch_sub(threads_, std::memory_order_relaxed); }
    Places(const Places&) = delete;
    Places& operator=(const Places&) = delete;

    int threads() const { return threads_; }

   private:
    int threads_;
};

struct Work {
    std::atomic<int64_t> next{0};
    int64_t count;
    void (*body)(void*, int64_t);
    void* context;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error{};  // the first
};

// Threads take the next piece when they are free: pieces differ in cost, and cores may be shared. What one
// throws waits for the caller: frames of a runtime do not unwind, and others still use the caller's stack.
void take_pieces(void* data) noexcept {
    Work& work = *static_cast<Work*>(data);
    try {
        for (int64_t i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) {
            work.body(work.context, i);
        }
    } catch (...) {
        if (!work.failed.test_and_set()) work.error = std::current_exception();
        work.next.store(work.count, std::memory_order_relaxed);
    }
}

void run_on_own_threads(int threads, Work& work) {
    std::vector<std::thread> others;
    try {
        others.reserve(threads - 1);
        for (int t = 1; t < threads; ++t) others.emplace_back(take_pieces, &work);
    } catch (const std::exception&) {
        // The work is done by those that could be started.
    }
    take_pieces(&work);
    for (std::thread& thread : others) thread.join();
}

void run_on(int threads, Work& work) {
    if (threads <= 1) return take_pieces(&work);
    if (OpenMPParallel entry = runtime.load()) return entry(take_pieces, &work, threads, 0);
    run_on_own_threads(threads, work);
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};

struct Scratch {
    std::unique_ptr<void, Free> memory;
    int64_t bytes = 0;
};

}  // namespace

void set_parallel_runtime(OpenMPParallel entry) { runtime = entry; }

void run_parallel(int threads, int64_t count, void (*body)(void*, int64_t), void* context) {
    Work work;
    work.count = count;
    work.body = body;
    work.context = context;
    const Places places(static_cast<int>(std::min<int64_t>(threads, count)));
    run_on(places.threads(), work);
    if (work.error) std::rethrow_exception(work.error);
}

void* thread_scratch(int slot, int64_t bytes) {
    constexpr int64_t kLine = 64;
    thread_local Scratch slots[kScratchSlots];
    Scratch& scratch = slots[slot];
    if (scratch.bytes < bytes) {
        scratch.memory.reset();
        scratch.bytes = (bytes + kLine - 1) / kLine * kLine;
        scratch.memory.reset(std::aligned_alloc(kLine, scratch.bytes));
        if (!scratch.memory) {
            scratch.bytes = 0;
            throw std::bad_alloc();
        }
    }
    return scratch.memory.get();
}

}  // namespace shelfkern
