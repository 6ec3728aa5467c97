// Tiles of 64 columns: the costs of a row in a tile are a few vectors, the entries above `low` a word of bits, most of
// which are zero.
//
// Narrow costs are compared in float. alpha is rounded up and low down before; subtraction rounds monotonically, so an
// entry above low in double is never below it in float.
#include "ot/column_scan.h"

#include "common/widen.h"
#include "ot/lane_mask.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int kTile = 64;
constexpr int kCollectColumns = 1024, kBoundColumns = 128;  // of a pass over the rows; what these need stays near
constexpr int kPointRows = 64, kPointDims = 32;
constexpr int kGroups = 256, kMostRanks = 128;

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

// f(i, of_row(i), j, c) for every row i and every tile from column j on: c[0 .. 64) are its costs, +infinity past the
// end. Distances of points are rounded: up, or down. Of a tile, rows come in order.
template <class T, class C, class R, class F>
[[gnu::always_inline]] inline void each_tile(const Cost& t, int64_t begin, int64_t end, bool up, const R& of_row,
                                             const F& f) {
  if (!t.matrix) {
    const C error = C(t.d + 4) * (sizeof(C) == 8 ? C(0x1p-53) : C(0x1p-24)), scale = up ? 1 + error : 1 - error;
    alignas(64) C costs[kPointRows * kTile];
    for (int64_t j = begin; j < end; j += kTile)
      for (int64_t i = 0; i < t.n; i += kPointRows) {
        const int64_t rows = t.n - i < kPointRows ? t.n - i : kPointRows;
        distances<T, C>(t, i, rows, j, end - j < kTile ? end - j : kTile, scale, costs);
        for (int64_t r = 0; r < rows; ++r) f(i + r, of_row(i + r), j, costs + r * kTile);
      }
    return;
  }
  const int64_t whole = begin + (end - begin) / kTile * kTile;
  for (int64_t i = 0; i < t.n; ++i) {
    const T* c = static_cast<const T*>(t.matrix) + i * t.m;
    const auto row = of_row(i);
    for (int64_t j = begin; j < whole; j += kTile) {
      if constexpr (std::is_same_v<T, C>) {
        f(i, row, j, c + j);
      } else {
        alignas(64) C wide[kTile];
#pragma omp simd
        for (int l = 0; l < kTile; ++l) wide[l] = widen(c[j + l]);
        f(i, row, j, wide);
      }
    }
    if (whole == end) continue;
    alignas(64) C wide[kTile];
    for (int l = 0; l < kTile; ++l) wide[l] = whole + l < end ? C(widen(c[whole + l])) : C(__builtin_inf());
    f(i, row, whole, wide);
  }
}

// One bit per column of a tile: not alpha - c < low.
template <class C>
[[gnu::always_inline]] inline uint64_t wanted(const C* c, C alpha, const C* low) {
  uint64_t bits = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {  // mostly nothing is wanted: find out before bits go to a general register
    __mmask16 lanes[4];
    for (int v = 0; v < 4; ++v)
      lanes[v] = _mm512_cmp_ps_mask((__m512)(alpha - load(c + 16 * v)), (__m512)load(low + 16 * v), _CMP_NLT_UQ);
    if (_kortestz_mask16_u8(_kor_mask16(lanes[0], lanes[1]), _kor_mask16(lanes[2], lanes[3]))) return 0;
    for (int v = 0; v < 4; ++v) bits |= uint64_t(lanes[v]) << 16 * v;
    return bits;
  }
#endif
  for (int v = 0; v < kTile; v += kLanes<C>) bits |= not_below(alpha - load(c + v), load(low + v)) << v;
  return bits;
}

inline void append(const ColumnScan& t, int64_t i, int64_t j) {
  const int64_t at = t.count[j]++, to = j * t.capacity + at;
  if (at >= t.capacity) return;
  t.index[to] = int32_t(i);
  if (t.value) t.value[to] = t.alpha[i] - cost_at(t.cost, i, j);
}
// The wanted columns of a tile; c: its costs. Out of line: it is rare, and its variables would push those of the search
// out of the registers.
template <class C>
[[gnu::noinline]] void append_bits(const ColumnScan& t, int64_t i, int64_t j, int64_t end, const C* c, uint64_t bits) {
  const bool exact = t.cost.matrix && t.value;  // distances of points were rounded on the way
  const double alpha = t.alpha[i];
  for (; bits; bits &= bits - 1) {
    const int l = __builtin_ctzll(bits);
    const int64_t column = j + l;
    if (column >= end) break;
    if (!exact) {
      append(t, i, column);
      continue;
    }
    const int64_t at = t.count[column]++, to = column * t.capacity + at;
    if (at >= t.capacity) continue;
    t.index[to] = int32_t(i);
    t.value[to] = alpha - double(c[l]);
  }
}

// The wanted columns of one row. Where most tiles have some, a branch for each would be guessed wrong half the time:
// then all are written down first, without a branch.
struct RowHits {
  static constexpr bool kCanList = kVectorBytes == 64;
  int64_t row = -1, count = 0, listed = 0;
  bool list = false;
  alignas(64) int32_t columns[kCollectColumns + 16];

  [[gnu::noinline]] void next(const ColumnScan& t, int64_t i, int64_t begin, int64_t end) {
    for (int64_t p = 0; p < listed; ++p)
      if (columns[p] < end) append(t, row, columns[p]);
    list = kCanList && t.cost.matrix && 2 * (count + listed) > (end - begin) / kTile;
    row = i;
    count = listed = 0;
  }
  [[gnu::always_inline]] void add(int64_t j, const float* c, float alpha, const float* low) {
#if defined(__AVX512F__)
    __m512i lane = _mm512_add_epi32(_mm512_set1_epi32(int(j)),
                                    _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    __mmask16 lanes[4];
    for (int v = 0; v < 4; ++v) lanes[v] = __mmask16(not_below(alpha - load(c + 16 * v), load(low + 16 * v)));
    int32_t* to = columns + listed;  // a copy: the compiler cannot keep the member in a register
    for (int v = 0; v < 4; ++v) {
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(lanes[v], lane));
      to += __builtin_popcount(lanes[v]);
      lane = _mm512_add_epi32(lane, _mm512_set1_epi32(16));
    }
    listed = to - columns;
#else
    (void)j, (void)c, (void)alpha, (void)low;
#endif
  }
};

template <class T, class C>
void collect(const ColumnScan& t, int64_t begin, int64_t end) {
  alignas(64) C low[kCollectColumns];
  for (int64_t j = begin; j < begin + kCollectColumns; ++j) low[j - begin] = C(__builtin_inf());
  for (int64_t j = begin; j < end; ++j) {
    round_down(t.low[j], low[j - begin]);
    t.count[j] = 0;
  }
  RowHits hits;
  each_tile<T, C>(
      t.cost, begin, end, false,
      [&](int64_t i) {
        C alpha;
        round_up(t.cost.matrix ? t.alpha[i] : t.alpha[i] + 0x1p-120, alpha);
        hits.next(t, i, begin, end);
        return alpha;
      },
      [&](int64_t i, C alpha, int64_t j, const C* c) {
        if constexpr (sizeof(C) == 4)
          if (hits.list) return hits.add(j, c, alpha, low + (j - begin));
        const uint64_t bits = wanted(c, alpha, low + (j - begin));
        if (!bits) return;
        hits.count += __builtin_popcountll(bits);
        append_bits(t, i, j, end, c, bits);
      });
  hits.next(t, -1, begin, end);
}

// Of every column the largest entries of `groups` sets of rows. The k-th largest of these, and the threshold that they
// alone would have, are below those of the whole column.
template <class T, class C>
void bound(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  const int64_t sought = max_nz < kMostRanks ? 4 * max_nz : t.cost.n / 4;
  const int64_t groups = sought < 64 ? 64 : sought > kGroups ? kGroups : sought;
  alignas(64) C largest[kGroups * kBoundColumns];
  for (int64_t e = 0; e < groups * kBoundColumns; ++e) largest[e] = -C(__builtin_inf());
  each_tile<T, C>(
      t.cost, begin, end, true, [&](int64_t i) { return C(t.alpha[i]); },
      [&](int64_t i, C alpha, int64_t j, const C* c) {
        C* to = largest + i % groups * kBoundColumns + (j - begin);
        for (int v = 0; v < kTile; v += kLanes<C>) {
          const Vec<C> x = alpha - load(c + v), old = load(to + v), now = greater(x, old);
          __builtin_memcpy(to + v, &now, sizeof now);
        }
      });
  const C rounding = sizeof(C) == 8 ? C(0x1p-50) : C(0x1p-21);
  const int64_t ranks = max_nz <= kMostRanks && max_nz <= groups ? max_nz : 1;
  for (int64_t v = 0; v < end - begin; v += kLanes<C>) {
    Vec<C> ranked[kMostRanks], scaled = {};
    for (int64_t r = 0; r < ranks; ++r) ranked[r] = Vec<C>{} - C(__builtin_inf());
    for (int64_t g = 0; g < groups; ++g) {
      insert<C>(load(largest + g * kBoundColumns + v), ranked, ranks);
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
      low = greater(higher, low);
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
