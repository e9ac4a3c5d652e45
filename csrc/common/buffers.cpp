#include "buffers.h"

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

    void clear() {
        for (auto& [capacity, memory] : idle) std::free(memory);
        idle.clear();
        bytes = 0;
    }
};

// Never destroyed: buffers may outlive every other static.
Pool& pool() {
    static Pool* instance = new Pool;
    return *instance;
}

void* allocate(size_t capacity) {
    const size_t alignment = capacity >= kHugePage ? kHugePage : kPage;
    void* memory = std::aligned_alloc(alignment, (capacity + alignment - 1) / alignment * alignment);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    // Only a wish: without huge pages everything works, with more page faults.
    if (alignment == kHugePage) madvise(memory, capacity, MADV_HUGEPAGE);
#endif
    return memory;
}

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

Buffer::Buffer(size_t bytes) : bytes_(bytes), capacity_((bytes + kPage - 1) / kPage * kPage) {
    if (capacity_ == 0) capacity_ = kPage;
    data_ = take_idle(capacity_, capacity_);
    if (!data_) data_ = allocate(capacity_);
}

Buffer::~Buffer() {
    Pool& p = pool();
    const std::lock_guard<std::mutex> lock(p.mutex);
    if (p.bytes + capacity_ > kLimit) {
        std::free(data_);
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
        p.clear();
    }
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
}

}  // namespace shelfkern
