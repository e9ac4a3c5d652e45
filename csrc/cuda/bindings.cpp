#include "bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <utility>

#include "attention_gate.h"
#include "shared_block.h"
#include "stem.h"
#include "upsample_add.h"
#include "upsample_argmax.h"
#include "upsample_softmax_sum.h"

namespace py = pybind11;

namespace shelfkern {
namespace cuda {
namespace {

using Address = uintptr_t;
// Strides of n, h and w, in elements.
using Strides = std::array<int64_t, 3>;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

// Address of the stream, and whether kernels may overlap.
using Queue = std::pair<Address, bool>;

Stream stream(const Queue& queue) { return {pointer(queue.first), queue.second}; }

Nhwc nhwc(Address data, int64_t n, int64_t h, int64_t w, int64_t c, const Strides& strides) {
    return {pointer(data), n, h, w, c, strides[0], strides[1], strides[2]};
}

void bind_upsample_add(Address x, Address skip, Address gate, Address out, int dtype, int64_t n, int64_t h,
                       int64_t w, int64_t c, const Strides& x_strides, const Strides& skip_strides,
                       const Strides& out_strides, const Queue& queue) {
    const py::gil_scoped_release unlocked;
    upsample_add(
        {nhwc(x, n, h, w, c, x_strides), nhwc(skip, n, 2 * h, 2 * w, c, skip_strides),
         pointer<const float>(gate), nhwc(out, n, 2 * h, 2 * w, c, out_strides), static_cast<DType>(dtype)},
        stream(queue));
}

void bind_shared_block(Address x, Address weight, Address scale1, Address shift1, Address scale2,
                       Address shift2, Address out, int dtype, int64_t n, int64_t h, int64_t w, int64_t c,
                       const Strides& x_strides, const Strides& out_strides, float slope, bool skip, int rows,
                       int64_t blocks, const Queue& queue) {
    const py::gil_scoped_release unlocked;
    shared_block({nhwc(x, n, h, w, c, x_strides), pointer(weight), pointer<const float>(scale1),
                  pointer<const float>(shift1), pointer<const float>(scale2), pointer<const float>(shift2),
                  nhwc(out, n, h, w, c, out_strides), static_cast<DType>(dtype), slope, skip, rows, blocks},
                 stream(queue));
}

void bind_upsample_argmax(Address scores, Address labels, int dtype, int64_t n, int64_t h, int64_t w,
                          int64_t c, const Strides& scores_strides, int64_t full_h, int64_t full_w,
                          int64_t out_h, int64_t out_w, bool align_corners, const Queue& queue) {
    const py::gil_scoped_release unlocked;
    upsample_argmax({nhwc(scores, n, h, w, c, scores_strides), pointer<uint8_t>(labels),
                     static_cast<DType>(dtype), full_h, full_w, out_h, out_w, align_corners},
                    stream(queue));
}

// out_strides: strides of n, c and h.
void bind_upsample_softmax_sum(Address scores, Address out, int dtype, int64_t n, int64_t h, int64_t w,
                               int64_t c, const Strides& scores_strides, int64_t full_h, int64_t full_w,
                               int64_t out_h, int64_t out_w, bool align_corners, bool mirror, bool exp,
                               const Strides& out_strides, const Queue& queue) {
    const py::gil_scoped_release unlocked;
    upsample_softmax_sum(
        {nhwc(scores, n, h, w, c, scores_strides), pointer<float>(out), static_cast<DType>(dtype), full_h,
         full_w, out_h, out_w, out_strides[0], out_strides[1], out_strides[2], mirror, exp, align_corners},
        stream(queue));
}

void bind_attention_gate(Address x, Address weight, Address scale, Address shift, Address sums, Address out,
                         int dtype, int64_t n, int64_t h, int64_t w, int64_t c, const Strides& x_strides,
                         int64_t slices, int64_t k, const Queue& queue) {
    const py::gil_scoped_release unlocked;
    attention_gate({nhwc(x, n, h, w, c, x_strides), pointer<const float>(weight), pointer<const float>(scale),
                    pointer<const float>(shift), pointer<float>(sums), slices, pointer<float>(out), k,
                    static_cast<DType>(dtype)},
                   stream(queue));
}

// image_strides: strides of n, channels, h and w. h, w: size of out.
void bind_stem(Address image, Address values, Address weight, Address scale, Address shift, Address out,
               int image_dtype, int dtype, int64_t n, int64_t image_h, int64_t image_w,
               const std::array<int64_t, 4>& image_strides, int64_t h, int64_t w, int64_t k,
               const Strides& out_strides, float slope, int64_t blocks, const Queue& queue) {
    const py::gil_scoped_release unlocked;
    const auto [stride_n, stride_c, stride_h, stride_w] = image_strides;
    stem({{pointer(image), static_cast<DType>(image_dtype), n, image_h, image_w, stride_n, stride_c, stride_h,
           stride_w},
          pointer<const float>(values),
          pointer(weight),
          pointer<const float>(scale),
          pointer<const float>(shift),
          nhwc(out, n, h, w, k, out_strides),
          static_cast<DType>(dtype),
          slope,
          blocks},
         stream(queue));
}

}  // namespace

void bind_cuda_kernels(py::module_& m) {
    m.def("attention_gate", &bind_attention_gate, py::arg("x"), py::arg("weight"), py::arg("scale"),
          py::arg("shift"), py::arg("sums"), py::arg("out"), py::arg("dtype"), py::arg("n"), py::arg("h"),
          py::arg("w"), py::arg("c"), py::arg("x_strides"), py::arg("slices"), py::arg("k"),
          py::arg("stream"));
    m.def("shared_block", &bind_shared_block, py::arg("x"), py::arg("weight"), py::arg("scale1"),
          py::arg("shift1"), py::arg("scale2"), py::arg("shift2"), py::arg("out"), py::arg("dtype"),
          py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("x_strides"),
          py::arg("out_strides"), py::arg("slope"), py::arg("skip"), py::arg("rows"), py::arg("blocks"),
          py::arg("stream"));
    m.def("stem", &bind_stem, py::arg("image"), py::arg("values"), py::arg("weight"), py::arg("scale"),
          py::arg("shift"), py::arg("out"), py::arg("image_dtype"), py::arg("dtype"), py::arg("n"),
          py::arg("image_h"), py::arg("image_w"), py::arg("image_strides"), py::arg("h"), py::arg("w"),
          py::arg("k"), py::arg("out_strides"), py::arg("slope"), py::arg("blocks"), py::arg("stream"));
    m.def("upsample_add", &bind_upsample_add, py::arg("x"), py::arg("skip"), py::arg("gate"), py::arg("out"),
          py::arg("dtype"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("x_strides"),
          py::arg("skip_strides"), py::arg("out_strides"), py::arg("stream"));
    m.def("upsample_argmax", &bind_upsample_argmax, py::arg("scores"), py::arg("labels"), py::arg("dtype"),
          py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("scores_strides"),
          py::arg("full_h"), py::arg("full_w"), py::arg("out_h"), py::arg("out_w"), py::arg("align_corners"),
          py::arg("stream"));
    m.def("upsample_softmax_sum", &bind_upsample_softmax_sum, py::arg("scores"), py::arg("out"),
          py::arg("dtype"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("c"), py::arg("scores_strides"),
          py::arg("full_h"), py::arg("full_w"), py::arg("out_h"), py::arg("out_w"), py::arg("align_corners"),
          py::arg("mirror"), py::arg("exp"), py::arg("out_strides"), py::arg("stream"));
}

}  // namespace cuda
}  // namespace shelfkern
