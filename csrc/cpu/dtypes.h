// From an element type known at run time to one known to the compiler.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace shelfkern {
namespace SHELFKERN_ISA {

template <typename T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<bf16> = DType::bf16;
template <>
constexpr DType kDType<uint8_t> = DType::u8;

// Gives body(T{}) for the T among those an op takes that `dtype` is; for the last without asking.
template <typename T, typename... Others, typename Body>
static inline auto with_type(DType dtype, const Body& body) {
    if constexpr (sizeof...(Others) > 0) {
        if (dtype != kDType<T>) return with_type<Others...>(dtype, body);
    }
    return body(T{});
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
