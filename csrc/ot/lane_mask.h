// lane_mask.h: lanes of a comparison as bits, and what is done with them. For *.kernel.cpp only: everything is local to
// the file that includes it.
#pragma once
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/simd.h"

namespace gradops {
namespace {

// One bit per lane: not v < low, so that NaN is seen.
[[gnu::always_inline]] inline uint64_t not_below(Vec<float> v, Vec<float> low) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, (__m512)low, _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)low, _CMP_NLT_UQ)));
#elif defined(__SSE2__)
  return unsigned(_mm_movemask_ps(_mm_cmpnlt_ps((__m128)v, (__m128)low)));
#else
  uint64_t bits = 0;
  for (int l = 0; l < kLanes<float>; ++l) bits |= uint64_t(!(v[l] < low[l])) << l;
  return bits;
#endif
}
[[gnu::always_inline]] inline uint64_t not_below(Vec<double> v, Vec<double> low) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)v, (__m512d)low, _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return unsigned(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, (__m256d)low, _CMP_NLT_UQ)));
#elif defined(__SSE2__)
  return unsigned(_mm_movemask_pd(_mm_cmpnlt_pd((__m128d)v, (__m128d)low)));
#else
  uint64_t bits = 0;
  for (int l = 0; l < kLanes<double>; ++l) bits |= uint64_t(!(v[l] < low[l])) << l;
  return bits;
#endif
}

// a > b ? a : b and a < b ? a : b, which gcc does not make one instruction of: b where one is NaN. (Its unmasked
// intrinsics warn of variables of their own.)
[[gnu::always_inline]] inline Vec<float> greater(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline Vec<float> lesser(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
[[gnu::always_inline]] inline Vec<double> greater(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}
[[gnu::always_inline]] inline Vec<double> lesser(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_maskz_min_pd(0xff, (__m512d)a, (__m512d)b);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

[[gnu::always_inline]] inline double lesser(double a, double b) {
#if defined(__SSE2__)
  return _mm_cvtsd_f64(_mm_min_sd(_mm_set_sd(a), _mm_set_sd(b)));
#else
  return a < b ? a : b;
#endif
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every set of four lanes their numbers in order, and those of their halves: to bring them to the front. (The
// instruction that makes such an order out of bits is slow on some processors.)
struct FrontOfFour {
  alignas(16) int32_t lanes[16][4] = {};
  alignas(32) int32_t halves[16][8] = {};
  constexpr FrontOfFour() {
    for (int set = 0; set < 16; ++set)
      for (int lane = 0, place = 0; lane < 4; ++lane)
        if (set >> lane & 1) {
          lanes[set][place] = lane;
          halves[set][2 * place] = 2 * lane, halves[set][2 * place + 1] = 2 * lane + 1;
          ++place;
        }
  }
};
constexpr FrontOfFour kFrontOfFour;

// The lanes of `set` to the front; others behind.
[[gnu::always_inline]] inline __m256i to_front(__m256i v, unsigned set) {
  return _mm256_permutevar8x32_epi32(v, _mm256_load_si256(reinterpret_cast<const __m256i*>(kFrontOfFour.halves[set])));
}
[[gnu::always_inline]] inline __m128i to_front(__m128i v, unsigned set) {
  const __m128i lanes = _mm_load_si128(reinterpret_cast<const __m128i*>(kFrontOfFour.lanes[set]));
  return _mm_castps_si128(_mm_permutevar_ps(_mm_castsi128_ps(v), lanes));
}
// All ones in the first `count` of four lanes.
[[gnu::always_inline]] inline __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
#endif

// Where words are not zero, ascending; without a branch, as nobody can guess which ones are. `where` has `count`
// places.
inline int32_t list_nonzero(const uint64_t* words, int32_t count, int32_t* where) {
  int32_t found = 0, k = 0;
#if defined(__AVX512DQ__)
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; k + 16 <= count; k += 16) {
    const __m512i low = _mm512_loadu_si512(words + k), high = _mm512_loadu_si512(words + k + 8);
    const __mmask16 some = _mm512_kunpackb(_mm512_test_epi64_mask(high, high), _mm512_test_epi64_mask(low, low));
    const __m512i places = _mm512_add_epi32(first, _mm512_set1_epi32(k));
    _mm512_storeu_si512(where + found, _mm512_maskz_compress_epi32(some, places));
    found += __builtin_popcount(_cvtmask16_u32(some));
  }
#elif defined(__AVX2__)
  for (; k + 4 <= count; k += 4) {  // what is behind the found ones lies before k + 4
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + k));
    const __m256i zero = _mm256_cmpeq_epi64(four, _mm256_setzero_si256());
    const unsigned some = 15u ^ unsigned(_mm256_movemask_pd(_mm256_castsi256_pd(zero)));
    const __m128i places = _mm_load_si128(reinterpret_cast<const __m128i*>(kFrontOfFour.lanes[some]));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(where + found), _mm_add_epi32(places, _mm_set1_epi32(k)));
    found += __builtin_popcount(some);
  }
#endif
  for (; k < count; ++k) {
    where[found] = k;
    found += words[k] != 0;
  }
  return found;
}

template <class V>
[[gnu::always_inline]] inline void exchange(V& high, V& low) {
  const V more = greater(low, high);
  low = lesser(low, high);
  high = more;
}
// Falling order, of numbers that fall and then rise, or rise and then fall.
template <int N, class V>
[[gnu::always_inline]] inline void sort_bitonic(V* v) {
  if constexpr (N > 1) {
    for (int i = 0; i < N / 2; ++i) exchange(v[i], v[i + N / 2]);
    sort_bitonic<N / 2>(v);
    sort_bitonic<N / 2>(v + N / 2);
  }
}
// Batcher's networks.
template <int N, class V>
[[gnu::always_inline]] inline void sort_few(V* v) {
  if constexpr (N == 4) {
    constexpr int8_t kPairs[5][2] = {{0, 1}, {2, 3}, {0, 2}, {1, 3}, {1, 2}};
    for (const auto& pair : kPairs) exchange(v[pair[0]], v[pair[1]]);
  } else {
    static_assert(N == 8);
    constexpr int8_t kPairs[19][2] = {{0, 1}, {2, 3}, {4, 5}, {6, 7}, {0, 2}, {1, 3}, {4, 6}, {5, 7}, {1, 2}, {5, 6},
                                      {0, 4}, {1, 5}, {2, 6}, {3, 7}, {2, 4}, {3, 5}, {1, 2}, {3, 4}, {5, 6}};
#pragma GCC unroll 19
    for (int i = 0; i < 19; ++i) exchange(v[kPairs[i][0]], v[kPairs[i][1]]);
  }
}
// The largest of x(0), ..., x(count - 1) in falling order, lane by lane. count: a multiple of 8.
template <int kRanks, class V, class F>
[[gnu::always_inline]] inline void find_largest(int64_t count, const F& x, V* top) {
  constexpr int kSome = kRanks < 8 ? 4 : 8;
  for (int r = 0; r < kRanks; ++r) top[r] = V{} - __builtin_inff();
  for (int64_t s = 0; s < count; s += kSome) {
    V next[kSome];
    for (int r = 0; r < kSome; ++r) next[r] = x(s + r);
    sort_few<kSome>(next);
    if (s == 0) {
      for (int r = 0; r < kSome; ++r) top[r] = next[r];
      continue;
    }
    for (int r = 0; r < kSome; ++r) top[kRanks - 1 - r] = greater(top[kRanks - 1 - r], next[r]);
    sort_bitonic<kRanks>(top);
  }
}

// The first `count` numbers, `rest` in the lanes after them. Reads no others.
[[gnu::always_inline]] inline Vec<double> load_some(const double* p, int64_t count, double rest) {
  count = count < 0 ? 0 : count > kLanes<double> ? kLanes<double> : count;
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_mask_loadu_pd(_mm512_set1_pd(rest), __mmask8((1u << count) - 1), p);
#elif defined(__AVX2__)
  const __m256i there = first_lanes(count);
  return (Vec<double>)_mm256_blendv_pd(_mm256_set1_pd(rest), _mm256_maskload_pd(p, there), _mm256_castsi256_pd(there));
#else
  Vec<double> v = Vec<double>{} + rest;
  for (int64_t l = 0; l < count; ++l) v[l] = p[l];
  return v;
#endif
}

[[gnu::always_inline]] inline void store_some(double* p, int64_t count, Vec<double> v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, count < 8 ? __mmask8((1u << count) - 1) : __mmask8(0xff), (__m512d)v);
#elif defined(__AVX2__)
  _mm256_maskstore_pd(p, first_lanes(count), (__m256d)v);
#else
  for (int64_t l = 0; l < count && l < kLanes<double>; ++l) p[l] = v[l];
#endif
}

}  // namespace
}  // namespace gradops
