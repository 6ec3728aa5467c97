// scan_lanes.h: a vector of doubles as consecutive tokens: maps composed, shifted, loaded and stored.
// For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "common/widen.h"

namespace gradops {
namespace {

constexpr int W = kLanes<double>;
using D = Vec<double>;
using M = Vec<int64_t>;  // -1 or 0 in a lane
using Lanes = std::make_integer_sequence<int, W>;

template <int S, class V, int... N>
[[gnu::always_inline]] inline V shift(V x, V fill, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(x, fill, (N + S)...);
}
template <int S, class V>
[[gnu::always_inline]] inline V shift(V x, V fill) {  // lane i takes lane i + S, or the fill
  return shift<S>(x, fill, Lanes());
}
template <int... N>
[[gnu::always_inline]] inline D reverse(D x, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(x, x, (W - 1 - N)...);
}
template <int... N>
[[gnu::always_inline]] inline D first_everywhere(D x, std::integer_sequence<int, N...>) {
  return __builtin_shufflevector(x, x, (N * 0)...);
}
[[gnu::always_inline]] inline D all(double x) { return D{} + x; }

// Composes the maps of the lanes: afterwards lane i holds the map of tokens i, i + 1, ..., W - 1. A cut (a = 0)
// hides what lies behind it, NaN included.
template <int S>
[[gnu::always_inline]] inline void compose(D& x, D& a) {
  const M open = a != 0;
  const D y = x + a * shift<S>(x, D{});
  x = open ? y : x;
  a = open ? a * shift<S>(a, all(1)) : a;
  if constexpr (2 * S < W) compose<2 * S>(x, a);
}
template <int S>
[[gnu::always_inline]] inline void next_that_counts(D& v, M& found, D otherwise) {
  const D w = shift<S>(v, otherwise);
  v = found ? v : w;
  found |= shift<S>(found, ~M{});
  if constexpr (2 * S < W) next_that_counts<2 * S>(v, found, otherwise);
}

typedef double Doubles __attribute__((vector_size(W * sizeof(double)), aligned(sizeof(double)), may_alias));
[[gnu::always_inline]] inline D load(const double* p) { return *reinterpret_cast<const Doubles*>(p); }
[[gnu::always_inline]] inline D load(const float* p) {
#if defined(__AVX512F__)  // gcc's own conversion of a vector takes twice the instructions
  return D(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p)));
#elif defined(__AVX2__)
  return D(_mm256_cvtps_pd(_mm_loadu_ps(p)));
#else
  D x;
  for (int i = 0; i < W; ++i) x[i] = p[i];
  return x;
#endif
}
template <class T>
[[gnu::always_inline]] inline D load(const T* p) {
  float x[W];
  for (int i = 0; i < W; ++i) x[i] = widen(p[i]);
  return load(x);
}
[[gnu::always_inline]] inline void store(D x, double* p) { *reinterpret_cast<Doubles*>(p) = x; }
[[gnu::always_inline]] inline void store(D x, float* p) {
#if defined(__AVX512F__)
  _mm256_storeu_ps(p, _mm512_maskz_cvtpd_ps(0xff, __m512d(x)));
#elif defined(__AVX2__)
  _mm_storeu_ps(p, _mm256_cvtpd_ps(__m256d(x)));
#else
  for (int i = 0; i < W; ++i) p[i] = float(x[i]);
#endif
}
[[gnu::always_inline]] inline M load_flags(const uint8_t* p) {
  M x;
#if defined(__AVX512F__)
  x = M(_mm512_maskz_cvtepu8_epi64(0xff, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__)
  x = M(_mm256_cvtepu8_epi64(_mm_loadu_si32(p)));
#else
  for (int i = 0; i < W; ++i) x[i] = p[i];
#endif
  return x != 0;
}

}  // namespace
}  // namespace gradops
