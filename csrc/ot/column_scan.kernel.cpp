// Tiles of 64 columns: the costs of a row in a tile are a few vectors, the entries above `low` a word of bits, most of
// which are zero.
//
// Narrow costs are compared in float. alpha is rounded up and low down before; subtraction rounds monotonically, so an
// entry above low in double is never below it in float.
#include "ot/column_scan.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/simd.h"
#include "common/widen.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int kTile = 64;
constexpr int kCollectColumns = 512, kBoundColumns = 128;  // of a pass over the rows; what these need stays near
constexpr int kPointRows = 64, kPointDims = 32;
constexpr int kGroups = 256, kMostRanks = 128;

// Numbers that are read where they lie are compared as they are; all others are widened to float first.
template <class C>
[[gnu::always_inline]] inline Vec<C> load(const C* p) {
  Vec<C> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

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

// The neighbour of v in float, where v is no float: rounded away from what must not be missed.
inline float next(float v, bool up) {
  const uint32_t bits = bits_of(v);
  if (!(v - v == 0.f)) return v;
  if (v == 0.f) return up ? 0x1p-126f : -0x1p-126f;
  return float_of((v > 0) == up ? bits + 1 : bits - 1);
}
inline void round_up(double v, float& to) {
  to = float(v);
  if (double(to) < v) to = next(to, true);
}
inline void round_up(double v, double& to) { to = v; }
inline void round_down(double v, float& to) {
  to = float(v);
  if (double(to) > v) to = next(to, false);
  if (to == -__builtin_inff()) to = -0x1.fffffep127f;  // entries of -infinity stay out
}
inline void round_down(double v, double& to) { to = v == -__builtin_inf() ? -0x1.fffffffffffffp1023 : v; }

// Squared distances of up to 64 rows from i, to the columns of a tile, times `scale`.
template <class T, class C>
void distances(const Cost& t, int64_t i, int64_t rows, int64_t j, int64_t columns, C scale, C* out) {
  const T *x = static_cast<const T*>(t.x), *y = static_cast<const T*>(t.y);
  C turned[kPointDims * kTile];
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
        Vec<C> first = load(out + r * kTile + v), second = load(out + r * kTile + v + kLanes<C>);
        for (int64_t e = 0; e < dims; ++e) {
          const Vec<C> p = at[e] - load(turned + e * kTile + v), q = at[e] - load(turned + e * kTile + v + kLanes<C>);
          first += p * p;
          second += q * q;
        }
        __builtin_memcpy(out + r * kTile + v, &first, sizeof first);
        __builtin_memcpy(out + r * kTile + v + kLanes<C>, &second, sizeof second);
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t l = 0; l < kTile; ++l)
      out[r * kTile + l] = l < columns ? out[r * kTile + l] * scale : C(__builtin_inf());
}

// f(i, j, c) for every row i and every tile from column j on: c[0 .. 64) are its costs, +infinity past the end.
// Distances of points are rounded: up, or down. Of a tile, rows come in order.
template <class T, class C, class F>
[[gnu::always_inline]] inline void each_tile(const Cost& t, int64_t begin, int64_t end, bool up, const F& f) {
  if (!t.matrix) {
    const C error = C(t.d + 4) * (sizeof(C) == 8 ? C(0x1p-53) : C(0x1p-24)), scale = up ? 1 + error : 1 - error;
    C costs[kPointRows * kTile];
    for (int64_t j = begin; j < end; j += kTile)
      for (int64_t i = 0; i < t.n; i += kPointRows) {
        const int64_t rows = t.n - i < kPointRows ? t.n - i : kPointRows;
        distances<T, C>(t, i, rows, j, end - j < kTile ? end - j : kTile, scale, costs);
        for (int64_t r = 0; r < rows; ++r) f(i + r, j, costs + r * kTile);
      }
    return;
  }
  const int64_t whole = begin + (end - begin) / kTile * kTile;
  for (int64_t i = 0; i < t.n; ++i) {
    const T* c = static_cast<const T*>(t.matrix) + i * t.m;
    for (int64_t j = begin; j < whole; j += kTile) {
      for (int64_t b = 0; b < kTile * int64_t(sizeof(T)); b += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(c + 8 * t.m + j) + b);
      if constexpr (std::is_same_v<T, C>) {
        f(i, j, c + j);
      } else {
        C wide[kTile];
#pragma omp simd
        for (int l = 0; l < kTile; ++l) wide[l] = widen(c[j + l]);
        f(i, j, wide);
      }
    }
    if (whole == end) continue;
    C wide[kTile];
    for (int l = 0; l < kTile; ++l) wide[l] = whole + l < end ? C(widen(c[whole + l])) : C(__builtin_inf());
    f(i, whole, wide);
  }
}

template <class T, class C>
void collect(const ColumnScan& t, int64_t begin, int64_t end) {
  C low[kCollectColumns];
  for (int64_t j = begin; j < begin + kCollectColumns; ++j) low[j - begin] = C(__builtin_inf());
  for (int64_t j = begin; j < end; ++j) {
    round_down(t.low[j], low[j - begin]);
    t.count[j] = 0;
  }
  int64_t row = -1;
  C alpha = 0;
  each_tile<T, C>(t.cost, begin, end, false, [&](int64_t i, int64_t j, const C* c) {
    if (i != row) round_up(t.cost.matrix ? t.alpha[i] : t.alpha[i] + 0x1p-120, alpha), row = i;
    uint64_t bits = 0;
    for (int v = 0; v < kTile; v += kLanes<C>) bits |= not_below(alpha - load(c + v), load(low + (j - begin) + v)) << v;
    for (; bits; bits &= bits - 1) {
      const int l = __builtin_ctzll(bits);
      if (j + l >= end) break;
      const int64_t at = t.count[j + l]++;
      if (at >= t.capacity) continue;
      const int64_t to = (j + l) * t.capacity + at;
      t.index[to] = int32_t(i);
      if (t.value) t.value[to] = t.alpha[i] - (t.cost.matrix ? double(c[l]) : cost_at(t.cost, i, j + l));
    }
  });
}

// Of every column the largest entries of `groups` sets of rows. The k-th largest of these, and the threshold that they
// alone would have, are below those of the whole column.
template <class T, class C>
void bound(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  const int64_t sought = max_nz < kMostRanks ? 4 * max_nz : t.cost.n / 4;
  const int64_t groups = sought < 64 ? 64 : sought > kGroups ? kGroups : sought;
  C largest[kGroups * kBoundColumns];
  for (int64_t e = 0; e < groups * kBoundColumns; ++e) largest[e] = -C(__builtin_inf());
  each_tile<T, C>(t.cost, begin, end, true, [&](int64_t i, int64_t j, const C* c) {
    C* to = largest + i % groups * kBoundColumns + (j - begin);
    const C alpha = C(t.alpha[i]);
    for (int v = 0; v < kTile; v += kLanes<C>) {
      const Vec<C> x = alpha - load(c + v), old = load(to + v), now = x > old ? x : old;
      __builtin_memcpy(to + v, &now, sizeof now);
    }
  });
  const C rounding = sizeof(C) == 8 ? C(0x1p-50) : C(0x1p-21);
  const int64_t ranks = max_nz <= kMostRanks && max_nz <= groups ? max_nz : 1;
  for (int64_t v = 0; v < end - begin; v += kLanes<C>) {
    Vec<C> ranked[kMostRanks], scaled = {};
    for (int64_t r = 0; r < ranks; ++r) ranked[r] = Vec<C>{} - C(__builtin_inf());
    for (int64_t g = 0; g < groups; ++g) {
      Vec<C> x = load(largest + g * kBoundColumns + v);
      for (int64_t r = 0; r < ranks; ++r) {
        const Vec<C> better = x > ranked[r] ? x : ranked[r];
        x = x > ranked[r] ? ranked[r] : x;
        ranked[r] = better;
      }
    }
    for (int l = 0; l < kLanes<C> && v + l < end - begin; ++l) scaled[l] = C(scaled_mass[begin + v + l]);
    const Vec<C> most = ranked[0];
    Vec<C> low = -scaled;  // relative to the largest: one entry takes all the mass
    for (int step = 0; step < 6; ++step) {
      Vec<C> sum = {}, size = {};
      for (int64_t g = 0; g < groups; ++g) {
        const Vec<C> x = load(largest + g * kBoundColumns + v) - most;
        sum += x >= low ? x : Vec<C>{};
        size += x >= low ? Vec<C>{} + 1 : Vec<C>{};
      }
      const Vec<C> higher = (sum - scaled) / size;
      low = higher > low ? higher : low;
    }
    for (int l = 0; l < kLanes<C> && v + l < end - begin; ++l) {
      const double top = double(most[l]), rank = ranks == max_nz ? double(ranked[ranks - 1][l]) : -__builtin_inf();
      double tau = top + double(low[l]) - double(rounding) * double(groups) * double(scaled[l]);
      if (rank > tau) tau = rank;
      const double size = __builtin_fabs(tau) + __builtin_fabs(top);
      tau -= double(rounding) * size + 0x1p-120;
      t.low[begin + v + l] = tau == tau ? tau : -__builtin_inf();
    }
  }
}

template <class F>
void with_arithmetic(Element e, const F& f) {
  with_type(e, [&](auto zero) {
    using T = decltype(zero);
    f(T(), Arithmetic<T>());
  });
}

}  // namespace

void scan_columns(const ColumnScan& t, int64_t begin, int64_t end) {
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end; j += kCollectColumns)
      collect<decltype(stored), decltype(wide)>(t, j, end - j < kCollectColumns ? end : j + kCollectColumns);
  });
}

void scan_bounds(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end; j += kBoundColumns)
      bound<decltype(stored), decltype(wide)>(t, scaled_mass, max_nz, j,
                                              end - j < kBoundColumns ? end : j + kBoundColumns);
  });
}

}  // namespace gradops::GRADOPS_ISA
