// exp2.h: powers of two without branches or calls, for exponents that are clamped to the normal range: below it the
// result is about the least normal number, above it about the largest. A NaN stays. For *.kernel.cpp only.
#pragma once
#include "common/exp_log.h"

namespace gradops {
namespace {

// 2^r = 1 + r p(r) on [-1/2, 1/2], p of least relative error: 2e-9, so that rounding is all that is seen.
[[gnu::always_inline]] inline float exp2_of(float z) {
  constexpr float kRound = 0x1.8p23f + 127;  // adding it leaves the integer part, with the bias, in the low bits
  z = z < -125.f ? -125.f : z;
  z = z > 126.f ? 126.f : z;
  const float shifted = z + kRound, r = z - (shifted - kRound);
  float p = 0x1.41fbbcp-13f;
  p = p * r + 0x1.5f3e52p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.f;
  return p * __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, shifted) << 23);
}
[[gnu::always_inline]] inline double exp2_of(double z) {
  constexpr double kRound = 0x1.8p52 + 1023;
  z = z < -1021. ? -1021. : z;
  z = z > 1022. ? 1022. : z;
  const double shifted = z + kRound, r = (z - (shifted - kRound)) * 0.69314718055994530942;
  const double p = 1. + (r + r * r * exp_tail(r));
  return p * __builtin_bit_cast(double, __builtin_bit_cast(uint64_t, shifted) << 52);
}

}  // namespace
}  // namespace gradops
