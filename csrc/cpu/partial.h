// Vectors of which only the first `count` lanes exist in memory: the last channels of a pixel.
#pragma once

#include "codes.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

template <typename T>
static inline vf load_some(const T* p, int count) {
    T lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i] = p[i];
    return load(lanes);
}

template <typename T>
static inline void store_some(T* p, vf v, int count) {
    T lanes[kLanes];
    store(lanes, v);
    for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

template <typename T>
static inline vf load_up_to(const T* p, int count) {
    return count == kLanes ? load(p) : load_some(p, count);
}

template <typename T>
static inline void store_up_to(T* p, vf v, int count) {
    if (count == kLanes) return store(p, v);
    store_some(p, v, count);
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
