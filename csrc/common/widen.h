// widen.h: bf16 and f16 as they lie in memory, to float and back, in integer arithmetic that every
// level vectorizes. For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include <cstdint>

#include "common/element.h"

namespace gradops {
namespace {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

[[gnu::always_inline]] inline float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
[[gnu::always_inline]] inline uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }

[[gnu::always_inline]] inline float widen(float x) { return x; }
[[gnu::always_inline]] inline double widen(double x) { return x; }
[[gnu::always_inline]] inline float widen(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
[[gnu::always_inline]] inline float widen(F16 x) {
  // The exponents' biases differ by 112; that of infinities moves as far again. No float on the way is denormal: it
  // might be taken for zero.
  const uint32_t bits = (x.bits & 0x7fffu) << 13;
  const float subnormal = float_of(bits + (113u << 23)) - 0x1p-14f;
  const uint32_t magnitude = bits < 0x400u << 13    ? bits_of(subnormal)
                             : bits < 0x7c00u << 13 ? bits + (112u << 23)
                                                    : bits + (224u << 23);
  return float_of(magnitude | (x.bits & 0x8000u) << 16);
}

// To nearest, ties to even.
[[gnu::always_inline]] inline void narrow(float x, float& to) { to = x; }
[[gnu::always_inline]] inline void narrow(double x, double& to) { to = x; }
[[gnu::always_inline]] inline void narrow(float x, Bf16& to) {
  const uint32_t bits = bits_of(x), even = bits >> 16 & 1;
  to.bits = uint16_t(x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + even) >> 16);
}
[[gnu::always_inline]] inline void narrow(float x, F16& to) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // 0.5 has ulps of 2^-24, the spacing of subnormal f16: the addition rounds.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : magnitude >= (143u << 23) ? 0x7c00u : normal;
  to.bits = uint16_t((bits >> 16 & 0x8000u) | (magnitude > 0x7f800000u ? 0x7e00u : finite));
}
template <class T>
[[gnu::always_inline]] inline void narrow(double x, T& to) {
  narrow(float(x), to);
}

// Calls f(T()) with the C++ type of e.
template <class F>
inline void with_type(Element e, const F& f) {
  switch (e) {
    case Element::bf16:
      return f(Bf16());
    case Element::f16:
      return f(F16());
    case Element::f32:
      return f(0.f);
    case Element::f64:
      return f(0.);
  }
}

}  // namespace
}  // namespace gradops
