// The Python module shelfkern._native: the CPU's kernels, and cuda/bindings.cpp's.
//
// Tensors come as addresses and sizes, checked by the callers in shelfkern/ops; kernels run without
// the interpreter's lock.
#include "cuda/bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "common/buffers.h"
#include "common/parallel.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace shelfkern;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

void upsample_add(Address x, Address skip, Address gate, Address out, int dtype, int64_t n, int64_t h,
                  int64_t w, int64_t c, int threads, float x_zero, float x_scale, float skip_scale,
                  float bias) {
    const py::gil_scoped_release unlocked;
    kernels().upsample_add({pointer(x), pointer(skip), pointer<float>(gate), pointer(out),
                            static_cast<DType>(dtype), n, h, w, c, threads, x_zero, x_scale, skip_scale,
                            bias});
}

void attention_gate(Address x, Address weight, Address scale, Address shift, Address out, int dtype,
                    int64_t n, int64_t hw, int64_t c, int64_t k, int threads, float step, float zero) {
    const py::gil_scoped_release unlocked;
    kernels().attention_gate({pointer(x), pointer<float>(weight), pointer<float>(scale),
                              pointer<float>(shift), pointer<float>(out), static_cast<DType>(dtype), n, hw, c,
                              k, threads, step, zero});
}

template <void (*Kernels::*kernel)(const Resize&)>
void resize(Address scores, Address out, int dtype, int64_t n, int64_t h, int64_t w, int64_t c,
            int64_t full_h, int64_t full_w, int64_t out_h, int64_t out_w, bool align_corners, int threads) {
    const py::gil_scoped_release unlocked;
    (kernels().*kernel)({pointer(scores), pointer(out), static_cast<DType>(dtype), n, h, w, c, full_h, full_w,
                         out_h, out_w, align_corners, threads});
}

void upsample_softmax_sum(Address scores, Address out, int dtype, int64_t n, int64_t h, int64_t w, int64_t c,
                          int64_t full_h, int64_t full_w, int64_t out_h, int64_t out_w, bool align_corners,
                          int threads, bool mirror, bool exp, int64_t stride_n, int64_t stride_c,
                          int64_t stride_h) {
    const py::gil_scoped_release unlocked;
    kernels().upsample_softmax_sum({{pointer(scores), pointer(out), static_cast<DType>(dtype), n, h, w, c,
                                     full_h, full_w, out_h, out_w, align_corners, threads, mirror},
                                    stride_n,
                                    stride_c,
                                    stride_h,
                                    exp});
}

py::tuple upsample_cross_entropy(Address scores, int dtype, int64_t n, int64_t h, int64_t w, int64_t c,
                                 int64_t full_h, int64_t full_w, int64_t out_h, int64_t out_w,
                                 bool align_corners, int threads, Address target, bool wide_target,
                                 int64_t ignore_index, Address weight, float label_smoothing, Address losses,
                                 Address gradient, Address kept_of, float cutoff, float share) {
    CrossEntropySums sums;
    {
        const py::gil_scoped_release unlocked;
        sums = kernels().upsample_cross_entropy({{pointer(scores), nullptr, static_cast<DType>(dtype), n, h,
                                                  w, c, full_h, full_w, out_h, out_w, align_corners, threads},
                                                 pointer(target),
                                                 wide_target,
                                                 ignore_index,
                                                 pointer<float>(weight),
                                                 label_smoothing,
                                                 pointer<float>(losses),
                                                 pointer<float>(gradient),
                                                 pointer<float>(kept_of),
                                                 cutoff,
                                                 share});
    }
    return py::make_tuple(sums.loss, sums.weight, sums.unknown);
}

py::tuple select_hardest(Address losses, int64_t count, int64_t least, float threshold, int threads) {
    Hardest hardest;
    {
        const py::gil_scoped_release unlocked;
        hardest = kernels().select_hardest({pointer<float>(losses), count, least, threshold, threads});
    }
    return py::make_tuple(hardest.cutoff, hardest.share, hardest.loss, hardest.kept);
}

void conv_bn_act(Address x, Address weight, Address scale, Address shift, Address residual, Address skip,
                 Address out, int dtype, int product, int64_t n, int64_t h, int64_t w, int64_t c,
                 int64_t out_h, int64_t out_w, int64_t out_c, int64_t kernel_h, int64_t kernel_w,
                 int64_t stride, int64_t pad_h, int64_t pad_w, int64_t chunk, int64_t stride_n,
                 int64_t stride_h, int64_t stride_w, float slope, int threads, Address start, int x_zero,
                 float residual_scale, float skip_scale, float bias, bool to_codes) {
    const py::gil_scoped_release unlocked;
    kernels().conv_bn_act({pointer(x),
                           pointer(weight),
                           pointer<float>(scale),
                           pointer<float>(shift),
                           pointer(residual),
                           pointer(skip),
                           pointer(out),
                           static_cast<DType>(dtype),
                           static_cast<Product>(product),
                           n,
                           h,
                           w,
                           c,
                           out_h,
                           out_w,
                           out_c,
                           kernel_h,
                           kernel_w,
                           stride,
                           pad_h,
                           pad_w,
                           chunk,
                           stride_n,
                           stride_h,
                           stride_w,
                           slope,
                           threads,
                           pointer<int32_t>(start),
                           x_zero,
                           residual_scale,
                           skip_scale,
                           bias,
                           to_codes});
}

void quantize(Address x, Address codes, int dtype, int64_t count, float codes_scale, float zero, uint8_t sign,
              int threads) {
    const py::gil_scoped_release unlocked;
    kernels().quantize({pointer(x), pointer<uint8_t>(codes), static_cast<DType>(dtype), count, codes_scale,
                        zero, sign, threads});
}

void bn_act_dropout(Address x, Address residual, Address weight, Address bias, Address noise, Address out,
                    Address mean, Address var, Address mask, int dtype, int64_t n, int64_t hw, int64_t c,
                    float eps, float slope, bool given, int threads) {
    const py::gil_scoped_release unlocked;
    kernels().bn_act_dropout({pointer(x), pointer(residual), pointer<float>(weight), pointer<float>(bias),
                              pointer<float>(noise), pointer(out), pointer<float>(mean), pointer<float>(var),
                              pointer<uint8_t>(mask), static_cast<DType>(dtype), n, hw, c, eps, slope, given,
                              threads});
}

void bn_act_dropout_backward(Address grad, Address x, Address weight, Address mean, Address var,
                             Address noise, Address mask, Address grad_x, Address grad_residual,
                             Address grad_weight, Address grad_bias, int dtype, int64_t n, int64_t hw,
                             int64_t c, float eps, float slope, int threads) {
    const py::gil_scoped_release unlocked;
    kernels().bn_act_dropout_backward({pointer(grad), pointer(x), pointer<float>(weight),
                                       pointer<float>(mean), pointer<float>(var), pointer<float>(noise),
                                       pointer<uint8_t>(mask), pointer(grad_x), pointer(grad_residual),
                                       pointer<float>(grad_weight), pointer<float>(grad_bias),
                                       static_cast<DType>(dtype), n, hw, c, eps, slope, threads});
}

void max_pool(Address x, Address out, Address taps, int dtype, int64_t n, int64_t h, int64_t w, int64_t c,
              int threads) {
    const py::gil_scoped_release unlocked;
    kernels().max_pool(
        {pointer(x), pointer(out), pointer<uint8_t>(taps), static_cast<DType>(dtype), n, h, w, c, threads});
}

void max_pool_backward(Address grad, Address taps, Address grad_x, int dtype, int64_t n, int64_t h, int64_t w,
                       int64_t c, int threads) {
    const py::gil_scoped_release unlocked;
    kernels().max_pool_backward({pointer(grad), pointer<uint8_t>(taps), pointer(grad_x),
                                 static_cast<DType>(dtype), n, h, w, c, threads});
}

Product product_of(const std::string& kind) {
    static const std::map<std::string, Product> products = {{"float32", Product::float32},
                                                            {"bfloat16", Product::bfloat16},
                                                            {"int8", Product::int8},
                                                            {"int16", Product::int16}};
    const auto found = products.find(kind);
    if (found == products.end()) {
        throw py::value_error("kind is '" + kind + "', it may be float32, bfloat16, int8 or int16");
    }
    return found->second;
}

bool has_product(const std::string& kind) { return kernels().has[static_cast<int>(product_of(kind))]; }

double peak(const std::string& kind, int threads, int64_t milliseconds) {
    if (!has_product(kind)) {
        throw py::value_error("kind is '" + kind + "', for which " + kernels().isa + " has no instructions");
    }
    if (threads < 1) {
        throw py::value_error("threads is " + std::to_string(threads) + ", it must be at least 1");
    }
    const py::gil_scoped_release unlocked;
    return kernels().peak({product_of(kind), threads, milliseconds});
}

void stem(Address image, Address values, Address weight, Address scale, Address shift, Address out,
          int image_dtype, int dtype, int product, int64_t n, int64_t image_h, int64_t image_w,
          int64_t padded_h, int64_t padded_w, int64_t h, int64_t w, int64_t out_c, float slope, int threads,
          Address raw, uint32_t zero, float bias, bool transformed) {
    const py::gil_scoped_release unlocked;
    const auto kernel = transformed ? kernels().stem_winograd : kernels().stem;
    kernel({pointer(image),
            pointer<float>(values),
            pointer(weight),
            pointer<float>(scale),
            pointer<float>(shift),
            pointer(out),
            static_cast<DType>(image_dtype),
            static_cast<DType>(dtype),
            static_cast<Product>(product),
            n,
            image_h,
            image_w,
            padded_h,
            padded_w,
            h,
            w,
            out_c,
            slope,
            threads,
            pointer<float>(raw),
            zero,
            bias});
}

void winograd(Address x, Address weight, Address units, Address levels, Address scale, Address shift,
              Address residual, Address skip, Address out, int dtype, int product, int64_t n, int64_t h,
              int64_t w, int64_t c, int64_t out_h, int64_t out_w, int64_t out_c, int tile, int stride,
              bool transposed, int64_t chunk, int64_t stride_n, int64_t stride_h, int64_t stride_w,
              float slope, int threads, int x_zero, float residual_scale, float skip_scale, float bias) {
    const py::gil_scoped_release unlocked;
    kernels().winograd({pointer(x),
                        pointer(weight),
                        pointer<float>(units),
                        pointer<float>(levels),
                        pointer<float>(scale),
                        pointer<float>(shift),
                        pointer(residual),
                        pointer(skip),
                        pointer(out),
                        static_cast<DType>(dtype),
                        static_cast<Product>(product),
                        n,
                        h,
                        w,
                        c,
                        out_h,
                        out_w,
                        out_c,
                        tile,
                        stride,
                        transposed,
                        chunk,
                        stride_n,
                        stride_h,
                        stride_w,
                        slope,
                        threads,
                        x_zero,
                        residual_scale,
                        skip_scale,
                        bias});
}

void winograd_block(Address x, Address weight, Address units, Address levels, Address scale1, Address shift1,
                    Address scale2, Address shift2, Address hidden, Address out, int dtype, int product,
                    int64_t n, int64_t h, int64_t w, int64_t c, bool skip, float slope, int threads) {
    const py::gil_scoped_release unlocked;
    kernels().winograd_block({pointer(x), pointer(weight), pointer<float>(units), pointer<float>(levels),
                              pointer<float>(scale1), pointer<float>(shift1), pointer<float>(scale2),
                              pointer<float>(shift2), pointer(hidden), pointer(out),
                              static_cast<DType>(dtype), static_cast<Product>(product), n, h, w, c, skip,
                              slope, threads});
}

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (const char* const* name = runnable_isas(); *name; ++name) names.emplace_back(*name);
    return names;
}

void bind_buffers(py::module_& m) {
    py::class_<Buffer>(m, "Buffer", py::buffer_protocol())
        .def(py::init<size_t, bool>(), py::arg("nbytes"), py::arg("pooled") = true)
        .def_buffer([](Buffer& b) {
            return py::buffer_info(static_cast<uint8_t*>(b.data()), static_cast<py::ssize_t>(b.bytes()));
        });
    m.def("idle_buffer_bytes", &idle_buffer_bytes);
    m.def("buffer_limit", &buffer_limit);
    m.def("give_back", &give_back, py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.def("isas", &isas);
    m.def("isa", [] { return std::string(kernels().isa); });
    m.def("force_isa", [](const std::string& isa) { return force_isa(isa.c_str()); });
    m.def("set_parallel_runtime",
          [](Address entry) { set_parallel_runtime(reinterpret_cast<OpenMPParallel>(entry)); });
    m.attr("compiler") = SHELFKERN_COMPILER;
    m.attr("cuda_archs") = SHELFKERN_CUDA_ARCHS;

    m.def("upsample_add", &upsample_add);
    m.def("attention_gate", &attention_gate);
    m.def("upsample_bilinear", &resize<&Kernels::upsample_bilinear>);
    m.def("upsample_bilinear_backward", &resize<&Kernels::upsample_bilinear_backward>);
    m.def("upsample_argmax", &resize<&Kernels::upsample_argmax>);
    m.def("upsample_softmax_sum", &upsample_softmax_sum);
    m.def("upsample_cross_entropy", &upsample_cross_entropy);
    m.def("select_hardest", &select_hardest);
    m.def("conv_bn_act", &conv_bn_act);
    m.def("quantize", &quantize);
    m.def("bn_act_dropout", &bn_act_dropout);
    m.def("bn_act_dropout_backward", &bn_act_dropout_backward);
    m.def("max_pool", &max_pool);
    m.def("max_pool_backward", &max_pool_backward);
    m.def("has_product", &has_product);
    m.def("peak", &peak);
    m.def("stem", &stem);
    m.def("winograd", &winograd);
    m.def("winograd_block", &winograd_block);
#if defined(SHELFKERN_WITH_CUDA)
    py::module_ on_gpu = m.def_submodule("cuda");
    cuda::bind_cuda_kernels(on_gpu);
#endif
    bind_buffers(m);
}
