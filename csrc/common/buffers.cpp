#include "buffers.h"

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace shelfkern {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t{2} << 20;
constexpr size_t kLimit = size_t{512} << 20;

struct Pool {
    std::mutex mutex;
    std::multimap<size_t, void*> idle;  // by capacity
    size_t bytes = 0;
};

// Never destroyed: buffers may outlive every other static.
Pool& pool() {
    static Pool* instance = new Pool;
    return *instance;
}

// Of whole pages, or null. On Linux mapped for itself, so that they go back to the system whatever lies
// beside them in the C library's heap, and the heap's own pieces, freed around memory that stays, do as well.
#if defined(__linux__)
void* allocate(size_t capacity) {
    // Huge pages are only a wish: without them everything works, with more page faults.
    const size_t spare = capacity >= kHugePage ? kHugePage : 0;
    void* mapping =
        mmap(nullptr, capacity + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return nullptr;
    if (!spare) return mapping;
    char* const begin = static_cast<char*>(mapping);
    const size_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
    if (before) munmap(begin, before);
    munmap(begin + before + capacity, spare - before);
    madvise(begin + before, capacity, MADV_HUGEPAGE);
    return begin + before;
}

void release(void* memory, size_t capacity) { munmap(memory, capacity); }
#else
void* allocate(size_t capacity) { return std::aligned_alloc(kPage, capacity); }

void release(void* memory, size_t) { std::free(memory); }
#endif

// An idle buffer of the right size, or a little larger.
void* take_idle(size_t bytes, size_t& capacity) {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    const auto found = p.idle.lower_bound(bytes);
    if (found == p.idle.end() || found->first > bytes + bytes / 4) return nullptr;
    capacity = found->first;
    void* memory = found->second;
    p.bytes -= capacity;
    p.idle.erase(found);
    return memory;
}

}  // namespace

Buffer::Buffer(size_t bytes, bool pooled)
    : bytes_(bytes), capacity_((bytes + kPage - 1) / kPage * kPage), pooled_(pooled) {
    if (capacity_ == 0) capacity_ = kPage;
    data_ = pooled ? take_idle(capacity_, capacity_) : nullptr;
    if (!data_) data_ = allocate(capacity_);
    if (!data_) {
        // What is idle may be in the way.
        give_back();
        data_ = allocate(capacity_);
    }
    if (!data_) throw std::bad_alloc();
}

Buffer::~Buffer() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (!pooled_ || p.bytes + capacity_ > kLimit) {
        release(data_, capacity_);
        return;
    }
    p.idle.emplace(capacity_, data_);
    p.bytes += capacity_;
}

size_t idle_buffer_bytes() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    return p.bytes;
}

size_t buffer_limit() { return kLimit; }

void give_back() {
    Pool& p = pool();
    {
        const std::lock_guard<std::mutex> lock(p.mutex);
        for (const auto& [capacity, memory] : p.idle) release(memory, capacity);
        p.idle.clear();
        p.bytes = 0;
    }
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

}  // namespace shelfkern
