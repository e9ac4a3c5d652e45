// Python's view of the GPU ops: one function an op, compiled into _native (on a GPU) and _emulation.
#pragma once

#include <pybind11/pybind11.h>

namespace shelfkern {
namespace cuda {

// Adds every op to a module, under its own name. Addresses and the stream are integers.
void bind_cuda_kernels(pybind11::module_& m);

}  // namespace cuda
}  // namespace shelfkern
