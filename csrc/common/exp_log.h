// exp_log.h: exp and log without branches or calls, so that loops over them become vector code.
// Errors below 1.5 ulp; infinities, zeros and NaN as in the C library; results below the normal range
// are rounded twice. For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include <cstdint>

namespace gradops {
namespace {

template <class T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Int = int32_t;
  using Unsigned = uint32_t;
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // adding it leaves an integer in the low bits
  static constexpr float kLowest = -104.f, kHighest = 89.f;
  static constexpr float kLn2High = 0x1.62ep-1f, kLn2Low = 0x1.0bfbe8p-15f;  // High: products with n are exact
  static constexpr float kTiny = 0x1p-126f, kUp = 0x1p25f;
  static constexpr int kUpBits = 25;
};
template <>
struct FloatBits<double> {
  using Int = int64_t;
  using Unsigned = uint64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLowest = -746., kHighest = 710.;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kTiny = 0x1p-1022, kUp = 0x1p54;
  static constexpr int kUpBits = 54;
};

// e^r - 1 - r, over r^2, for |r| <= ln(2) / 2: the Taylor series, long enough for the type
[[gnu::always_inline]] inline float exp_tail(float r) {
  return 0.5f + r * (1.f / 6 + r * (1.f / 24 + r * (1.f / 120 + r * (1.f / 720 + r * (1.f / 5040)))));
}
[[gnu::always_inline]] inline double exp_tail(double r) {
  double p = 1. / 6227020800;  // 1 / 13!
  p = 1. / 479001600 + r * p;
  p = 1. / 39916800 + r * p;
  p = 1. / 3628800 + r * p;
  p = 1. / 362880 + r * p;
  p = 1. / 40320 + r * p;
  p = 1. / 5040 + r * p;
  p = 1. / 720 + r * p;
  p = 1. / 120 + r * p;
  p = 1. / 24 + r * p;
  p = 1. / 6 + r * p;
  return 0.5 + r * p;
}

template <class T>
[[gnu::always_inline]] inline T exp_of(T x) {
  using B = FloatBits<T>;
  using Unsigned = typename B::Unsigned;
  x = x < B::kLowest ? B::kLowest : x;  // a NaN passes
  x = x > B::kHighest ? B::kHighest : x;
  const T shifted = x * T(1.44269504088896340736) + B::kRound;
  const T n = shifted - B::kRound;
  const T r = (x - n * B::kLn2High) - n * B::kLn2Low;
  const T p = T(1) + (r + r * r * exp_tail(r));
  // 2^n in two factors, so that neither leaves the normal range: their exponents, with the bias, add up to k. (None is
  // negative. Before AVX-512 there is no instruction to shift wide numbers that are.)
  const Unsigned k = __builtin_bit_cast(Unsigned, shifted) - __builtin_bit_cast(Unsigned, B::kRound) + 2 * B::kBias;
  const T a = __builtin_bit_cast(T, (k >> 1) << B::kMantissa);
  const T b = __builtin_bit_cast(T, (k - (k >> 1)) << B::kMantissa);
  return p * a * b;
}

// (log(1 + f) - f + f^2 / 2) / s - f^2 / 2, with s = f / (2 + f), z = s^2: the odd series of log((1 + s) / (1 - s))
[[gnu::always_inline]] inline float log_tail(float z) {
  return z * (2.f / 3 + z * (2.f / 5 + z * (2.f / 7 + z * (2.f / 9 + z * (2.f / 11)))));
}
[[gnu::always_inline]] inline double log_tail(double z) {
  double p = 2. / 23;
  p = 2. / 21 + z * p;
  p = 2. / 19 + z * p;
  p = 2. / 17 + z * p;
  p = 2. / 15 + z * p;
  p = 2. / 13 + z * p;
  p = 2. / 11 + z * p;
  p = 2. / 9 + z * p;
  p = 2. / 7 + z * p;
  p = 2. / 5 + z * p;
  p = 2. / 3 + z * p;
  return z * p;
}

// |k| < 2^31 or 2^51: before AVX-512 there is no instruction for the latter.
[[gnu::always_inline]] inline float whole_of(int32_t k) { return float(k); }
[[gnu::always_inline]] inline double whole_of(int64_t k) {
  return __builtin_bit_cast(double, k + __builtin_bit_cast(int64_t, 0x1.8p52)) - 0x1.8p52;
}

template <class T>
[[gnu::always_inline]] inline T log_of(T x) {
  using B = FloatBits<T>;
  using Int = typename B::Int;
  const bool small = x < B::kTiny;
  const T scaled = small ? x * B::kUp : x;
  const Int bits = __builtin_bit_cast(Int, scaled);
  // the mantissa m in [sqrt(1/2), sqrt(2)): the offset is the bits of 1 less those of sqrt(1/2)
  const Int one = Int(B::kBias) << B::kMantissa;
  const Int root = __builtin_bit_cast(Int, T(0.70710678118654752440));
  using Unsigned = typename B::Unsigned;
  const Unsigned shifted = Unsigned(bits) + Unsigned(one - root);  // wraps for a NaN
  const Int k = Int(shifted >> B::kMantissa) - B::kBias;
  const T m = __builtin_bit_cast(T, (shifted & ((Unsigned(1) << B::kMantissa) - 1)) + Unsigned(root));
  const T f = m - T(1), s = f / (T(2) + f), half = T(0.5) * f * f;
  const T n = whole_of(small ? k - B::kUpBits : k);
  const T y = n * B::kLn2High - ((half - (s * (half + log_tail(s * s)) + n * B::kLn2Low)) - f);
  const T infinity = T(__builtin_inf());
  const T edge = x == T(0) ? -infinity : x < T(0) ? T(__builtin_nan("")) : x;  // also for +inf and NaN
  return x > T(0) && x < infinity ? y : edge;
}

}  // namespace
}  // namespace gradops
