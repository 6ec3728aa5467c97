// float_vectors.h: float vectors of numbers of 4 bytes and less, and their exponentials, for softmaxes over blocks of a
// row. For *.kernel.cpp only: everything is local to the file that includes it.
#pragma once
#include "common/exp_log.h"
#include "common/simd.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr double kInfinity = __builtin_inf();
constexpr float kLog2E = 1.44269504088896340736f;
constexpr double kLn2 = 0.69314718055994530942;

using Floats = Vec<float>;
using Words = Vec<uint32_t>;
constexpr int kWide = kLanes<float>, kPair = 2 * kWide;

[[gnu::always_inline]] inline Floats all(float x) { return x - Floats{}; }  // Floats{} + x would be an addition: of -0
[[gnu::always_inline]] inline Floats floats_of(Words bits) { return (Floats)bits; }
[[gnu::always_inline]] inline Words words_of(Floats x) { return (Words)x; }

// kPair numbers in two vectors. Of bfloat16 the one has the even and the other the odd ones, so that no lane moves.
struct Two {
  Floats a, b;
};
typedef float LooseFloats __attribute__((vector_size(kVectorBytes), may_alias, aligned(2)));
typedef uint32_t LooseWords __attribute__((vector_size(kVectorBytes), may_alias, aligned(2)));

[[gnu::always_inline]] inline Two load(const float* x) {
  return {*reinterpret_cast<const LooseFloats*>(x), *reinterpret_cast<const LooseFloats*>(x + kWide)};
}
[[gnu::always_inline]] inline void store(Two v, float* x) {
  *reinterpret_cast<LooseFloats*>(x) = v.a;
  *reinterpret_cast<LooseFloats*>(x + kWide) = v.b;
}

// The same past the caches, to x aligned to kVectorBytes: nothing is read first, where the line is not there. Other
// threads see it after streamed().
[[gnu::always_inline]] inline void stream(Two v, float* x) {
#if defined(__AVX512F__)
  __builtin_ia32_movntps512(x, v.a), __builtin_ia32_movntps512(x + kWide, v.b);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(x, v.a), __builtin_ia32_movntps256(x + kWide, v.b);
#elif defined(__SSE2__)
  __builtin_ia32_movntps(x, v.a), __builtin_ia32_movntps(x + kWide, v.b);
#else
  store(v, x);
#endif
}
inline void streamed() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

[[gnu::always_inline]] inline Two load(const Bf16* x) {
  const Words w = *reinterpret_cast<const LooseWords*>(x);
  return {floats_of(w << 16), floats_of(w & 0xffff0000u)};
}
// In the high halves. A NaN must not have ones in all of its low half, and those that bfloat16 numbers bring have none.
[[gnu::always_inline]] inline Words rounded_to_bf16(Floats x) {
  const Words bits = words_of(x);
  return bits + (bits >> 16 & 1u) + 0x7fffu;
}
[[gnu::always_inline]] inline void store(Two v, Bf16* x) {
  *reinterpret_cast<LooseWords*>(x) = rounded_to_bf16(v.a) >> 16 | (rounded_to_bf16(v.b) & 0xffff0000u);
}

// Of float16 the one vector has the first half of the numbers, where there are instructions for them.
#if defined(__AVX512F__)
typedef short Halves __attribute__((vector_size(32)));
typedef short LooseHalves __attribute__((vector_size(32), may_alias, aligned(2)));
[[gnu::always_inline]] inline Two load(const F16* x) {
  const Halves low = *reinterpret_cast<const LooseHalves*>(x), high = *reinterpret_cast<const LooseHalves*>(x + kWide);
  return {__builtin_ia32_vcvtph2ps512_mask(low, Floats{}, 0xffff, 4),
          __builtin_ia32_vcvtph2ps512_mask(high, Floats{}, 0xffff, 4)};
}
[[gnu::always_inline]] inline void store(Two v, F16* x) {
  *reinterpret_cast<LooseHalves*>(x) = __builtin_ia32_vcvtps2ph512_mask(v.a, 0, Halves{}, 0xffff);
  *reinterpret_cast<LooseHalves*>(x + kWide) = __builtin_ia32_vcvtps2ph512_mask(v.b, 0, Halves{}, 0xffff);
}
#elif defined(__F16C__)
typedef short Halves __attribute__((vector_size(16)));
typedef short LooseHalves __attribute__((vector_size(16), may_alias, aligned(2)));
[[gnu::always_inline]] inline Two load(const F16* x) {
  const Halves low = *reinterpret_cast<const LooseHalves*>(x), high = *reinterpret_cast<const LooseHalves*>(x + kWide);
  return {__builtin_ia32_vcvtph2ps256(low), __builtin_ia32_vcvtph2ps256(high)};
}
[[gnu::always_inline]] inline void store(Two v, F16* x) {
  *reinterpret_cast<LooseHalves*>(x) = __builtin_ia32_vcvtps2ph256(v.a, 0);
  *reinterpret_cast<LooseHalves*>(x + kWide) = __builtin_ia32_vcvtps2ph256(v.b, 0);
}
#else
[[gnu::always_inline]] inline Two load(const F16* x) {
  Two v;
  for (int i = 0; i < kWide; ++i) v.a[i] = widen(x[i]), v.b[i] = widen(x[kWide + i]);
  return v;
}
[[gnu::always_inline]] inline void store(Two v, F16* x) {
  for (int i = 0; i < kWide; ++i) narrow(float(v.a[i]), x[i]), narrow(float(v.b[i]), x[kWide + i]);
}
#endif

// x > than ? x : than, lane by lane. In so many words the compiler makes it a compare and a blend.
[[gnu::always_inline]] inline Floats larger(Floats x, Floats than) {
#if defined(__AVX512F__)
  return __builtin_ia32_maxps512_mask(x, than, than, 0xffff, 4);
#elif defined(__AVX2__)
  return __builtin_ia32_maxps256(x, than);
#elif defined(__SSE2__)
  return __builtin_ia32_maxps(x, than);
#else
  return x > than ? x : than;
#endif
}

template <int H, int... N>
[[gnu::always_inline]] inline Floats fold_larger(Floats x, std::integer_sequence<int, N...> lanes) {
  x = larger(x, __builtin_shufflevector(x, x, (N ^ H)...));
  if constexpr (H > 1) return fold_larger<H / 2>(x, lanes);
  return x;
}
// The largest lane of x, which has no NaN
[[gnu::always_inline]] inline float top_lane(Floats x) {
  return fold_larger<kWide / 2>(x, std::make_integer_sequence<int, kWide>())[0];
}

constexpr float kLowest = -124.f;  // exp2_of gives 2^kLowest or 0 for all that is lower
constexpr float kNothing = 0x1p-124f;

// 2^y; exactly 1 at 0, and something huge for y > 126. 2^r = 1 + r q(r) for |r| <= 1/2, with q of least relative error:
// 9e-8.
[[gnu::always_inline]] inline Floats exp2_of(Floats y) {
#if defined(__AVX512F__)
  const Floats n = __builtin_ia32_rndscaleps_mask(y, 8, y, 0xffff, 4), r = y - n;
#else
  y = -larger(all(-126), -larger(all(kLowest), y));
  const Floats shifted = y + 0x1.8p23f, r = y - (shifted - 0x1.8p23f);  // n in the low bits
#endif
  Floats p = 0x1.5bba14p-10f * r + 0x1.3cea88p-7f;
  p = p * r + 0x1.c6b752p-5f;
  p = p * r + 0x1.ebf9bcp-3f;
  p = p * r + 0x1.62e42ap-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return __builtin_ia32_scalefps512_mask(p, n, p, 0xffff, 4);  // 0 at -inf, where p is NaN
#else
  return floats_of(words_of(p) + (words_of(shifted) << 23));
#endif
}

#if defined(__AVX512F__)
alignas(64) constexpr float kPowers[32] = {
    // 2^(i / 32)
    0x1p+0f,        0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
    0x1.29e9ep+0f,  0x1.306fep+0f,  0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
    0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
    0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f77p+0f,  0x1.c199bep+0f, 0x1.cb720ep+0f,
    0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};
#endif

// 2^(d rate), exactly 1 at d = 0 and 0 far below.
struct Powers {
#if defined(__AVX512F__)
  // 2^(n + r), n a multiple of 1 / 32: that of n's fraction from a table, and 1 + r q(r) with q of least relative error
  // for |r| <= 1/64: 5e-8
  const Floats low = vec_at(kPowers), high = vec_at(kPowers + kWide);
  [[gnu::always_inline]] Floats operator()(Floats d, Floats rate) const {
    const Floats big = all(0x1.8p18f);  // whose last bit is 1 / 32
    const Floats shifted = d * rate + big, n = shifted - big, r = d * rate - n;
    const Floats fraction = __builtin_ia32_vpermt2varps512_mask((Vec<int>)shifted, low, high, 0xffff);
    const Floats p = (r * 0x1.ebfbep-3f + 0x1.62e584p-1f) * r + 1.f;
    return __builtin_ia32_scalefps512_mask(fraction * p, n, Floats{}, 0xffff, 4);  // 0 at -inf, where p is NaN
  }
#else
  [[gnu::always_inline]] Floats operator()(Floats d, Floats rate) const { return exp2_of(d * rate) - kNothing; }
#endif
};

inline double lanes_sum(Floats x) {
  double s = 0;
  for (int i = 0; i < kWide; ++i) s += double(x[i]);
  return s;
}

constexpr int64_t kBlock = 2048;  // entries that are worked on at a time, in the first-level cache

template <class T>
using Arithmetic = decltype(widen(T()));

}  // namespace
}  // namespace gradops::GRADOPS_ISA
