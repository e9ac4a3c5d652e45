// Large buffers that return to a pool: fresh pages cost more than many kernels that fill them.
#pragma once

#include <cstddef>

namespace shelfkern {

// Memory for one result or arena, page-aligned; goes back to the pool when destroyed.
class Buffer {
   public:
    explicit Buffer(size_t bytes);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void* data() const { return data_; }
    size_t bytes() const { return bytes_; }

   private:
    void* data_;
    size_t bytes_, capacity_;
};

// Bytes that wait in the pool, which keeps at most `buffer_limit()`.
size_t idle_buffer_bytes();
size_t buffer_limit();

// Gives idle buffers back to the system, and of what was freed elsewhere whole pages, which glibc keeps.
void give_back();

}  // namespace shelfkern
