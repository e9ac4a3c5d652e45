// Runs CUDA kernels on the CPU, one fiber per thread, and reports errors that a GPU would not detect.
//
// A launch runs its blocks one after another in random order and switches between a block's threads at
// barriers and collectives, in random order too, all from one seed. Races are detected from the
// synchronisation between two accesses, not from the order in which they happened, so detection does not
// depend on the seed.
//
// An error in a kernel is thrown by run() as a std::runtime_error of one sentence: its kernel, block, thread,
// source line and address. The launch ends there; the next one starts from a clean state.
#pragma once

#include <cstdint>
#include <string>

namespace shelfkern {
namespace emulation {

struct Grid {
    std::string name;
    int64_t x, y, z;
    int threads, shared_bytes;
    bool overlap;
};

// Position of the running thread.
struct Position {
    int thread;
    int64_t block_x, block_y, block_z, blocks_x, blocks_y, blocks_z;
};

// Counts since the last reset.
struct Statistics {
    int64_t launches, barriers, global_bytes_read, global_bytes_written, mma;
    // Wavefronts that ldmatrix needs beyond one per 8x8 matrix.
    int64_t bank_conflicts;
    int64_t shared_bytes;  // maximum over blocks
};

extern Position position;
extern Statistics statistics;
extern unsigned char* shared_memory;

void set_seed(uint64_t seed);

// Calls thread(arguments) once for every thread of the grid.
void run(const Grid& grid, void (*thread)(const void*), const void* arguments);

// The functions below are called by the running thread.

// Ends the launch with an error: the thread and its source line, then `what`.
[[noreturn]] void report(const std::string& what, int line);

void barrier(int line);

// A collective of the calling thread's warp: waits until every lane is at the same collective and line; the
// last one to arrive calls complete(requests of all lanes).
using Complete = void (*)(void* const* requests);
void collective(const char* name, Complete complete, void* request, int line);
// A collective that orders the warp's accesses to shared memory.
void warp_barrier(int line);

// Checks a window of shared memory from byte `start`.
void check_window(int64_t start, int64_t bytes, int alignment, int line);

// Records accesses to shared memory: `byte` counts from the start of the block's. The caller checks bounds.
void read_shared(int64_t byte, int bytes, int line);
void write_shared(int64_t byte, int bytes, int line);
// As above, by the whole warp at once.
void read_shared_by_warp(int64_t byte, int bytes, int line);

// Counts the bank conflicts of ldmatrix between the rows of an 8x8 matrix.
void count_bank_conflicts(const unsigned char* const (&rows)[8]);

// Records accesses to global memory that other threads or launches may write.
void read_global(const void* address, int bytes, int line);
void write_global(const void* address, int bytes, int line);

// Copies 16 bytes from source, or zeros if it is null, to shared memory at `byte`; completes when waited for.
void start_copy(int64_t byte, const void* source, int line);
void commit_copies();
void wait_for_copies(int in_flight, int line);

// From here on this thread may use the previous kernel's results.
void wait_for_previous();

}  // namespace emulation
}  // namespace shelfkern
