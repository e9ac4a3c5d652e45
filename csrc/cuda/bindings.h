// Python bindings of the GPU ops: one function per op, compiled into _native (on a GPU) and _emulation.
#pragma once

#include <pybind11/pybind11.h>

namespace shelfkern {
namespace cuda {

// Adds every op to a module, under the op's name. Addresses and the stream are integers.
void bind_cuda_kernels(pybind11::module_& m);

}  // namespace cuda
}  // namespace shelfkern
