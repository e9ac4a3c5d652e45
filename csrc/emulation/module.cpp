// The Python module shelfkern._emulation: the CUDA C++ kernels run on the CPU, for people who write them.
#include <pybind11/pybind11.h>

#include "../cuda/bindings.h"
#include "emulator.h"

namespace py = pybind11;
using namespace shelfkern;

PYBIND11_MODULE(_emulation, m) {
    cuda::bind_cuda_kernels(m);
    m.def("set_seed", &emulation::set_seed, py::arg("seed"));
    m.def("reset_statistics", [] { emulation::statistics = {}; });
    m.def("statistics", [] {
        const emulation::Statistics& s = emulation::statistics;
        py::dict counts;
        counts["launches"] = s.launches;
        counts["barriers"] = s.barriers;
        counts["global_bytes_read"] = s.global_bytes_read;
        counts["global_bytes_written"] = s.global_bytes_written;
        counts["mma"] = s.mma;
        counts["bank_conflicts"] = s.bank_conflicts;
        counts["shared_bytes"] = s.shared_bytes;
        return counts;
    });
}
