// The network's activations, given by their slope below zero: 0 relu, 1 none.
#pragma once

#include "primitives.cuh"

namespace shelfkern {
namespace cuda {

// NaN stays NaN, and minus infinity becomes 0 under relu.
DEVICE float activate(float v, float slope) {
    if (v < 0) return slope == 0 ? 0.0f : slope * v;
    return v;
}

}  // namespace cuda
}  // namespace shelfkern
