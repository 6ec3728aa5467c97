// cost_rows.h: a pass over the rows of costs, in tiles of 64 columns. For *.kernel.cpp only: everything is local to the
// file that includes it.
#pragma once
#include "common/widen.h"
#include "ot/cost.h"
#include "ot/lane_mask.h"

namespace gradops {
namespace {

constexpr int kTile = 64;
constexpr int kPointRows = 64, kPointDims = 32;

// kLanes<C> numbers in order.
template <class C>
[[gnu::always_inline]] inline Vec<C> load_wide(const C* x) {
  return load_anywhere(x);
}
[[gnu::always_inline]] inline Vec<float> load_wide(const Bf16* x) {
  typedef uint16_t Stored __attribute__((vector_size(2 * kLanes<float>)));
  Stored v;
  __builtin_memcpy(&v, x, sizeof v);
  return (Vec<float>)(__builtin_convertvector(v, Vec<uint32_t>) << 16);
}
[[gnu::always_inline]] inline Vec<float> load_wide(const F16* x) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  alignas(kVectorBytes) float wide[kLanes<float>];
  for (int l = 0; l < kLanes<float>; ++l) wide[l] = widen(x[l]);
  return vec_at(wide);
#endif
}

// Squared distances of up to 64 rows from i, to the columns of a tile, times `scale`.
template <class T, class C>
void distances(const Cost& t, int64_t i, int64_t rows, int64_t j, int64_t columns, C scale, C* out) {
  const T *x = static_cast<const T*>(t.x), *y = static_cast<const T*>(t.y);
  alignas(64) C turned[kPointDims * kTile];
  for (int64_t e = 0; e < rows * kTile; ++e) out[e] = C(0);
  for (int64_t e = 0; e < kPointDims * kTile; ++e) turned[e] = C(0);
  for (int64_t k = 0; k < t.d; k += kPointDims) {
    const int64_t dims = t.d - k < kPointDims ? t.d - k : kPointDims;
    for (int64_t l = 0; l < columns; ++l)
      for (int64_t e = 0; e < dims; ++e) turned[e * kTile + l] = widen(y[(j + l) * t.d + k + e]);
    for (int64_t r = 0; r < rows; ++r) {
      C at[kPointDims];
      for (int64_t e = 0; e < dims; ++e) at[e] = widen(x[(i + r) * t.d + k + e]);
      for (int v = 0; v < kTile; v += 2 * kLanes<C>) {
        Vec<C> first = load_anywhere(out + r * kTile + v), second = load_anywhere(out + r * kTile + v + kLanes<C>);
        for (int64_t e = 0; e < dims; ++e) {
          const Vec<C> p = at[e] - load_anywhere(turned + e * kTile + v),
                       q = at[e] - load_anywhere(turned + e * kTile + v + kLanes<C>);
          first += p * p;
          second += q * q;
        }
        store_anywhere(out + r * kTile + v, first);
        store_anywhere(out + r * kTile + v + kLanes<C>, second);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < kTile; ++l)
      out[r * kTile + l] = l < columns ? out[r * kTile + l] * scale : C(__builtin_inf());
}

// f(i, of_row(i), j, tiles, c) for every row i, until it is false: c[0 .. 64 * tiles) are its costs from column j on,
// +infinity past the end; as they are stored, but distances in C. Those are rounded: up, or down. Of a column, rows
// come in order.
template <class T, class C, class R, class F>
[[gnu::always_inline]] inline void each_row(const Cost& t, int64_t begin, int64_t end, bool up, const R& of_row,
                                            const F& f) {
  if (!t.matrix) {
    const C error = C(t.d + 4) * (sizeof(C) == 8 ? C(0x1p-53) : C(0x1p-24)), scale = up ? 1 + error : 1 - error;
    alignas(64) C costs[kPointRows * kTile];
    for (int64_t j = begin; j < end; j += kTile)
      for (int64_t i = 0; i < t.n; i += kPointRows) {
        const int64_t rows = t.n - i < kPointRows ? t.n - i : kPointRows;
        distances<T, C>(t, i, rows, j, end - j < kTile ? end - j : kTile, scale, costs);
        for (int64_t r = 0; r < rows; ++r)
          if (!f(i + r, of_row(i + r), j, 1, costs + r * kTile)) return;
      }
    return;
  }
  const int64_t direct = (end - begin) / kTile * kTile, rest = end - begin - direct;
  alignas(64) T last[kTile];
  for (int64_t l = rest; l < kTile; ++l) narrow(C(__builtin_inf()), last[l]);
  for (int64_t i = 0; i < t.n; ++i) {
    const T* c = static_cast<const T*>(t.matrix) + i * t.m + begin;
    const auto row = of_row(i);
    if (direct && !f(i, row, begin, direct / kTile, c)) return;
    if (rest == 0) continue;
    for (int64_t l = 0; l < rest; ++l) last[l] = c[direct + l];
    if (!f(i, row, begin + direct, 1, last)) return;
  }
}

// f(T(), C()): costs are stored as T, or their points are, and compared as C.
template <class F>
void with_arithmetic(Element e, const F& f) {
  with_type(e, [&](auto zero) {
    using T = decltype(zero);
    f(T(), Arithmetic<T>());
  });
}

}  // namespace
}  // namespace gradops
