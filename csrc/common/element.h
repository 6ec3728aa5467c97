// element.h: how numbers are stored in a tensor.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/host_device.h"

namespace gradops {
enum class Element : int { bf16, f16, f32, f64 };
GRADOPS_BOTH constexpr int64_t element_size(Element e) { return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2; }
template <class T>
using Arithmetic = std::conditional_t<sizeof(T) == 8, double, float>;  // what numbers stored as T are computed in
}  // namespace gradops
