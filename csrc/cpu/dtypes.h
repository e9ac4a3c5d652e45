// Dispatch from a dtype known at run time to an element type known at compile time.
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

// Returns body(T{}) for the one of an op's types that matches `dtype`; the last is used without a check.
template <typename T, typename... Others, typename Body>
static inline auto with_type(DType dtype, const Body& body) {
    if constexpr (sizeof...(Others) > 0) {
        if (dtype != kDType<T>) return with_type<Others...>(dtype, body);
    }
    return body(T{});
}

}  // namespace SHELFKERN_ISA
}  // namespace shelfkern
