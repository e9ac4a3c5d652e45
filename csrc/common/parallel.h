// Work shared among threads of the process's OpenMP runtime, without linking against one.
#pragma once

#include <cstdint>

namespace shelfkern {

// Entry point of an OpenMP runtime, GOMP_parallel; libgomp, libiomp5 and libomp all have it.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

// Uses the runtime that the caller's process already has, so that its threads and ours are the same
// ones and never compete; null goes back to threads started for each call.
void set_parallel_runtime(OpenMPParallel entry);

// Calls body(context, i) for i in [0, count), each i once, on up to `threads` threads: fewer while other
// calls are at work, so that all together are no more than the one that wants most. Of what calls throw the
// first is thrown here, when all threads have stopped; pieces that were not begun are left out.
void run_parallel(int threads, int64_t count, void (*body)(void*, int64_t), void* context);

template <typename Body>
void parallel_for(int threads, int64_t count, const Body& body) {
    run_parallel(
        threads, count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); },
        const_cast<Body*>(&body));
}

constexpr int kScratchSlots = 7;

// Memory of this thread's own, at least `bytes`, aligned to a cache line, kept from call to call.
// `slot`, below kScratchSlots, tells apart what one kernel holds at the same time.
void* thread_scratch(int slot, int64_t bytes);

}  // namespace shelfkern
