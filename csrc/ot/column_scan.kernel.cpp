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
// +infinity past the end. Distances of points are rounded: up, or down. Of a column, rows come in order.
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
  const int64_t direct = std::is_same_v<T, C> ? (end - begin) / kTile * kTile : 0, rest = end - begin - direct;
  const int64_t padded = (rest + kTile - 1) / kTile * kTile;
  alignas(64) C wide[std::is_same_v<T, C> ? kTile : kCollectColumns];
  for (int64_t l = rest; l < padded; ++l) wide[l] = C(__builtin_inf());
  for (int64_t i = 0; i < t.n; ++i) {
    const T* c = static_cast<const T*>(t.matrix) + i * t.m + begin;
    const auto row = of_row(i);
    if constexpr (std::is_same_v<T, C>)
      if (direct && !f(i, row, begin, direct / kTile, c)) return;
    if (rest == 0) continue;
#pragma omp simd
    for (int64_t l = 0; l < rest; ++l) wide[l] = widen(c[direct + l]);
    if (!f(i, row, begin + direct, padded / kTile, wide)) return;
  }
}

// One bit per column of a tile: not alpha - c < low.
template <class C>
[[gnu::always_inline]] inline uint64_t wanted(const C* c, C alpha, const C* low) {
  uint64_t bits = 0;
#if defined(__AVX512BW__)
  if constexpr (sizeof(C) == 4) {  // gcc would take every mask to a general register
    __mmask16 lanes[4];
    for (int v = 0; v < 4; ++v)
      lanes[v] = __mmask16(not_below(alpha - load_anywhere(c + 16 * v), load_anywhere(low + 16 * v)));
    return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(lanes[3], lanes[2]), _mm512_kunpackw(lanes[1], lanes[0])));
  }
#endif
  for (int v = 0; v < kTile; v += kLanes<C>)
    bits |= not_below(alpha - load_anywhere(c + v), load_anywhere(low + v)) << v;
  return bits;
}

// The tiles that have wanted entries, listed without a branch: nobody can guess which ones do.
struct WantedTile {
  uint64_t bits;
  int32_t row, column;  // the first of the tile, from the first of the scan
};
constexpr int64_t kListed = 512;

// put(place of a list, i, j) for every wanted entry that its list has room for. Returns how many were wanted.
template <class F>
[[gnu::always_inline]] inline int64_t each_entry(const ColumnScan& t, int64_t begin, const WantedTile* tiles,
                                                 int64_t count, const F& put) {
  const int64_t capacity = t.capacity;
  int32_t *counts = t.count + begin, *index = t.index;
  int64_t found = 0;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t i = tiles[p].row, first = tiles[p].column;
    uint64_t bits = tiles[p].bits;
    found += __builtin_popcountll(bits);
    do {
      const int64_t l = first + __builtin_ctzll(bits), at = counts[l]++, to = (begin + l) * capacity + at;
      bits &= bits - 1;
      if (at >= capacity) continue;
      index[to] = int32_t(i);
      put(to, i, begin + l);
    } while (bits);
  }
  return found;
}
template <class T>
[[gnu::noinline]] int64_t append(const ColumnScan& t, int64_t begin, const WantedTile* tiles, int64_t count) {
  double* value = t.value;
  const double* alpha = t.alpha;
  if (!value) return each_entry(t, begin, tiles, count, [](int64_t, int64_t, int64_t) {});
  if (const T* matrix = static_cast<const T*>(t.cost.matrix)) {
    const int64_t m = t.cost.m;
    return each_entry(t, begin, tiles, count, [=](int64_t to, int64_t i, int64_t j) {
      value[to] = alpha[i] - double(widen(matrix[i * m + j]));
    });
  }
  return each_entry(t, begin, tiles, count,
                    [&](int64_t to, int64_t i, int64_t j) { value[to] = alpha[i] - cost_at(t.cost, i, j); });
}

// False if more than `most` entries are wanted.
template <class T, class C>
bool collect(const ColumnScan& t, int64_t begin, int64_t end, int64_t& most) {
  alignas(64) C low[kCollectColumns];
  for (int64_t l = 0; l < kCollectColumns; ++l) low[l] = C(__builtin_inf());
  for (int64_t j = begin; j < end; ++j) {
    round_down(t.low[j], low[j - begin]);
    t.count[j] = 0;
  }
  WantedTile listed[kListed + kCollectColumns / kTile];
  int64_t count = 0;
  each_row<T, C>(
      t.cost, begin, end, false,
      [&](int64_t i) {
        C alpha;
        round_up(t.cost.matrix ? t.alpha[i] : t.alpha[i] + 0x1p-120, alpha);
        return alpha;
      },
      [&](int64_t i, C alpha, int64_t j, int64_t tiles, const C* c) {
        const T* next = t.cost.matrix ? static_cast<const T*>(t.cost.matrix) + (i + 1) * t.cost.m + j : nullptr;
        int64_t at = count;  // a copy: the compiler cannot keep the other one in a register
        for (int64_t l = 0; l < tiles * kTile; l += kTile) {
          listed[at] = {wanted(c + l, alpha, low + (j - begin) + l), int32_t(i), int32_t(j - begin + l)};
          at += listed[at].bits != 0;
          // The processor does not foresee where a part of a row goes on. (Past the end, or of null, it does nothing.)
          for (size_t e = 0; e < kTile * sizeof(T); e += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(next + l) + e);
        }
        count = at;
        if (count <= kListed) return true;
        most -= append<T>(t, begin, listed, count);
        count = 0;
        return most >= 0;
      });
  most -= append<T>(t, begin, listed, count);
  return most >= 0;
}

// Of every column the largest entries of `groups` sets of rows. The k-th largest of these, and the threshold that they
// alone would have, are below those of the whole column.
template <class T, class C>
void bound(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  const int64_t sought = max_nz < kMostRanks ? 4 * max_nz : t.cost.n / 4 < 128 ? t.cost.n / 4 : 128;
  const int64_t groups = sought <= 64 ? 64 : sought <= 128 ? 128 : kGroups;  // a row's is found without a division
  alignas(64) C largest[kGroups * kBoundColumns];
  for (int64_t e = 0; e < groups * kBoundColumns; ++e) largest[e] = -C(__builtin_inf());
  each_row<T, C>(
      t.cost, begin, end, true, [&](int64_t i) { return C(t.alpha[i]); },
      [&](int64_t i, C alpha, int64_t j, int64_t tiles, const C* c) {
        C* to = largest + (i & (groups - 1)) * kBoundColumns + (j - begin);
        const T* next = t.cost.matrix ? static_cast<const T*>(t.cost.matrix) + (i + 2) * t.cost.m + j : nullptr;
        for (int64_t v = 0; v < tiles * kTile; v += kLanes<C>) {
          __builtin_prefetch(next + v);
          const Vec<C> x = alpha - load_anywhere(c + v), old = load_anywhere(to + v), now = greater(x, old);
          store_anywhere(to + v, now);
        }
        return true;
      });
  const C rounding = sizeof(C) == 8 ? C(0x1p-50) : C(0x1p-21);
  const int64_t ranks = max_nz <= kMostRanks && max_nz <= groups ? max_nz : 1;
  for (int64_t v = 0; v < end - begin; v += kLanes<C>) {
    Vec<C> ranked[kMostRanks], scaled = {};
    for (int64_t r = 0; r < ranks; ++r) ranked[r] = Vec<C>{} - C(__builtin_inf());
    for (int64_t g = 0; g < groups; ++g) {
      insert<C>(load_anywhere(largest + g * kBoundColumns + v), ranked, ranks);
    }
    for (int l = 0; l < kLanes<C> && v + l < end - begin; ++l) scaled[l] = C(scaled_mass[begin + v + l]);
    const Vec<C> most = ranked[0];
    Vec<C> low = -scaled;  // relative to the largest: one entry takes all the mass
    for (int step = 0; step < 6; ++step) {
      Vec<C> sum = {}, size = {};
      for (int64_t g = 0; g < groups; ++g) {
        const Vec<C> x = load_anywhere(largest + g * kBoundColumns + v) - most;
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

bool scan_columns(const ColumnScan& t, int64_t begin, int64_t end) {
  int64_t most = t.most;
  bool all = true;
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end && all; j += kCollectColumns)
      all =
          collect<decltype(stored), decltype(wide)>(t, j, end - j < kCollectColumns ? end : j + kCollectColumns, most);
  });
  return all;
}

void scan_bounds(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end; j += kBoundColumns)
      bound<decltype(stored), decltype(wide)>(t, scaled_mass, max_nz, j,
                                              end - j < kBoundColumns ? end : j + kBoundColumns);
  });
}

}  // namespace gradops::GRADOPS_ISA
