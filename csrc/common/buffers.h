// Large buffers that return to a pool: fresh pages cost more than many kernels that fill them.
#pragma once

#include <cstddef>

namespace shelfkern {

// Page-aligned memory. Of a result or an arena it comes from the pool and goes back to it when destroyed;
// what is not pooled, as weights, whose sizes differ, goes back to the system.
class Buffer {
   public:
    explicit Buffer(size_t bytes, bool pooled = true);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

   private:
    void* data_;
    size_t bytes_, capacity_;
    bool pooled_;
};

// Bytes that wait in the pool, which keeps at most `buffer_limit()`.
size_t idle_buffer_bytes();
size_t buffer_limit();

// Gives idle buffers back to the system, and of what was freed elsewhere whole pages, which glibc keeps.
void give_back();

}  // namespace shelfkern
