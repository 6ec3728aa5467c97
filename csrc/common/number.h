// number.h: reads and writes numbers of any Element in CPU kernels.
//
// Everything here has internal linkage: the file is compiled once per instruction set, and a shared
// inline function could be linked in its AVX-512 form into code that runs without AVX-512.
#pragma once
#include <cstdint>

#include "common/element.h"

namespace gradops {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  _Float16 value;
};

[[maybe_unused]] inline float widen(float x) { return x; }
[[maybe_unused]] inline double widen(double x) { return x; }
[[maybe_unused]] inline float widen(Bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
[[maybe_unused]] inline float widen(F16 x) { return float(x.value); }

template <class T>
struct Narrow {
  static T from(double x) { return T(x); }
};
template <>
struct Narrow<Bf16> {
  static Bf16 from(double x) {  // to nearest, ties to even; NaN stays NaN
    const float f = float(x);
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    return {uint16_t(f != f ? 0x7fc0 : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
  }
};
template <>
struct Narrow<F16> {
  static F16 from(double x) { return {_Float16(float(x))}; }
};

// Calls f(T()) with the C++ type of e.
template <class F>
inline void with_type(Element e, const F& f) {
  switch (e) {
    case Element::bf16: return f(Bf16());
    case Element::f16: return f(F16());
    case Element::f32: return f(0.f);
    case Element::f64: return f(0.);
  }
}

}  // namespace
}  // namespace gradops
