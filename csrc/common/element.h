// element.h: how numbers are stored in a tensor.
#pragma once
#include <cstdint>

namespace gradops {
enum class Element : int { bf16, f16, f32, f64 };
constexpr int64_t element_size(Element e) { return e == Element::f64 ? 8 : e == Element::f32 ? 4 : 2; }
}  // namespace gradops
