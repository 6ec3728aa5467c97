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
constexpr int kGroups = 256, kMostRanks = 24;
constexpr int64_t kWords = 512;

// v in C, rounded away from what must not be missed; without a branch, as nobody can guess which way float(v) went.
inline void round_up(double v, float& to) {
  to = float(v);
  to = to * (to > 0 ? 1 + 0x1p-23f : 1 - 0x1p-23f) + 0x1p-126f;
}
inline void round_up(double v, double& to) { to = v; }
inline void round_down(double v, float& to) {
  to = float(v);
  to = to * (to > 0 ? 1 - 0x1p-23f : 1 + 0x1p-23f) - 0x1p-126f;
  to = to > -0x1.fffffep127f ? to : -0x1.fffffep127f;  // entries of -infinity stay out
}
inline void round_down(double v, double& to) { to = v == -__builtin_inf() ? -0x1.fffffffffffffp1023 : v; }

typedef __mmask16 LooseMask __attribute__((may_alias));

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

// One bit per column of a tile: not alpha - c < low.
template <class T, class C>
[[gnu::always_inline]] inline void wanted(const T* c, C alpha, const C* low, uint64_t* bits) {
#if defined(__AVX512BW__)
  if constexpr (sizeof(C) == 4) {  // gcc would join the masks in a general register
    for (int v = 0; v < 4; ++v) {
      const auto lanes = __mmask16(not_below(alpha - load_wide(c + 16 * v), load_anywhere(low + 16 * v)));
      asm("kmovw %1, %0" : "=m"(reinterpret_cast<LooseMask*>(bits)[v]) : "k"(lanes));
    }
    return;
  }
#endif
  uint64_t all = 0;
  for (int v = 0; v < kTile; v += kLanes<C>) all |= not_below(alpha - load_wide(c + v), load_anywhere(low + v)) << v;
  *bits = all;
}

// Where the lists of a pass's columns go on, and where they must end; from the first column's on.
struct Lists {
  int32_t next[kCollectColumns], end[kCollectColumns];
};

// Of some rows from `first` on, of 2^shift bits each, the wanted entries into their lists: put(i, l) gives for row i
// and column begin + l what is called for every entry: with its column from there on, and its place. Returns how many
// entries were wanted.
template <class F>
[[gnu::always_inline]] inline int64_t each_entry(Lists& lists, int32_t* index, int64_t first, int shift,
                                                 const uint64_t* words, int64_t count, const F& put) {
  int32_t where[kWords];
  const int64_t some = list_nonzero(words, int32_t(count), where);
  int64_t found = 0;
  for (int64_t p = 0; p < some; ++p) {
    const int64_t place = int64_t(where[p]) * kTile, i = first + (place >> shift);
    const int64_t from = place & ((int64_t(1) << shift) - 1);
    uint64_t bits = words[where[p]];
    found += __builtin_popcountll(bits);
    int32_t* next = lists.next + from;
    const int32_t* end = lists.end + from;
    const auto store = put(i, from);
    do {
      const int64_t l = __builtin_ctzll(bits), to = next[l]++;
      bits &= bits - 1;
      if (to >= end[l]) continue;
      index[to] = int32_t(i);
      store(l, to);
    } while (bits);
  }
  return found;
}
template <class T>
[[gnu::noinline]] int64_t append(const ColumnScan& t, int64_t begin, int64_t first, int shift, const uint64_t* words,
                                 int64_t count, Lists& lists) {
  int32_t* index = t.index + begin * t.capacity;
  double* value = t.value + begin * t.capacity;
  const double* alpha = t.alpha;
  const auto each = [&](const auto& put) __attribute__((always_inline)) {
    return each_entry(lists, index, first, shift, words, count, put);
  };
  if (t.cost.matrix) {
    const T* matrix = static_cast<const T*>(t.cost.matrix) + begin;
    const int64_t m = t.cost.m;
    if (t.costs)
      return each([=, less = t.shift](int64_t i, int64_t from) {
        return [=, c = matrix + i * m + from](int64_t l, int64_t to) { value[to] = double(widen(c[l])) - less; };
      });
    return each([=](int64_t i, int64_t from) {
      return
          [=, c = matrix + i * m + from, a = alpha[i]](int64_t l, int64_t to) { value[to] = a - double(widen(c[l])); };
    });
  }
  return each([&](int64_t i, int64_t from) {
    return [&, i, from](int64_t l, int64_t to) {
      const double c = cost_at(t.cost, i, begin + from + l);
      value[to] = t.costs ? c - t.shift : alpha[i] - c;
    };
  });
}

// False if more than `most` entries are wanted.
template <class T, class C>
bool collect(const ColumnScan& t, int64_t begin, int64_t end, int64_t& most) {
  alignas(64) C low[kCollectColumns];
  alignas(64) uint64_t words[kWords] = {};  // bits of the wanted entries, of a few rows: 2^shift for each
  int shift = 6;
  while (int64_t(1) << shift < end - begin) ++shift;
  const int64_t per_row = int64_t(1) << (shift - 6), rows = kWords / per_row;
  for (int64_t l = 0; l < per_row * kTile; ++l) low[l] = C(__builtin_inf());
  for (int64_t j = begin; j < end; ++j) round_down(t.low[j], low[j - begin]);
  Lists lists;
  for (int64_t j = 0; j < end - begin; ++j) lists.next[j] = int32_t(j * t.capacity);
  for (int64_t j = 0; j < end - begin; ++j) lists.end[j] = int32_t((j + 1) * t.capacity);
  int64_t first = 0;
  each_row<T, C>(
      t.cost, begin, end, false,
      [&](int64_t i) {
        C alpha;
        round_up(t.cost.matrix ? t.alpha[i] : t.alpha[i] + 0x1p-120, alpha);
        return alpha;
      },
      [&](int64_t i, C alpha, int64_t j, int64_t tiles, const auto* c) {
        uint64_t* to = words + (i - first) * per_row + (j - begin) / kTile;
        for (int64_t l = 0; l < tiles; ++l) {
          wanted(c + l * kTile, alpha, low + (j - begin) + l * kTile, to + l);
          // The processor does not foresee where a part of a row goes on. (Past the end it does nothing.)
          for (size_t e = 0; e < kTile; e += 64 / sizeof(T)) __builtin_prefetch(c + t.cost.m + l * kTile + e);
        }
        if (j + tiles * kTile < end || i - first + 1 < rows) return true;
        most -= append<T>(t, begin, first, shift, words, kWords, lists);
        first = i + 1;
        return most >= 0;
      });
  if (most < 0) return false;
  most -= append<T>(t, begin, first, shift, words, (t.cost.n - first) * per_row, lists);
  for (int64_t j = 0; j < end - begin; ++j) t.count[begin + j] = lists.next[j] - int32_t(j * t.capacity);
  return most >= 0;
}

// Of every column the largest entries of `groups` sets of rows. The k-th largest of these, and the threshold that they
// alone would have, are below those of the whole column.
template <class T, class C>
void bound(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  const int64_t sought = max_nz < kGroups / 2 ? 4 * max_nz : t.cost.n / 4 < 128 ? t.cost.n / 4 : 128;
  const int64_t groups = sought <= 64 ? 64 : sought <= 128 ? 128 : kGroups;  // a row's is found without a division
  alignas(64) C largest[kGroups * kBoundColumns];
  for (int64_t e = 0; e < groups * kBoundColumns; ++e) largest[e] = -C(__builtin_inf());
  each_row<T, C>(
      t.cost, begin, end, true, [&](int64_t i) { return C(t.alpha[i]); },
      [&](int64_t i, C alpha, int64_t j, int64_t tiles, const auto* c) {
        C* to = largest + (i & (groups - 1)) * kBoundColumns + (j - begin);
        for (int64_t v = 0; v < tiles * kTile; v += kLanes<C>) {
          __builtin_prefetch(c + 2 * t.cost.m + v);
          const Vec<C> x = alpha - load_wide(c + v), old = load_anywhere(to + v), now = greater(x, old);
          store_anywhere(to + v, now);
        }
        return true;
      });
  const C rounding = sizeof(C) == 8 ? C(0x1p-50) : C(0x1p-21);
  const int64_t ranks = max_nz <= kMostRanks ? max_nz : 1;
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
    Vec<C> rank = Vec<C>{} - C(__builtin_inf());
    if (ranks == max_nz) {
      rank = ranked[ranks - 1];
    } else if (max_nz <= groups) {
      // Many ranks: up to a hundredth before the max_nz-th largest's distance from the largest, where it is above
      // `low`. Halves what lies between in the order of the bits, so that numbers of any size may be among the entries.
      using Bits = Vec<std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>>;
      Bits far = (Bits)-low, near = {};
      for (int step = 0; step < 14; ++step) {
        const Bits middle = step == 0 ? far : near + (far - near) / 2;
        const Vec<C> distance = (Vec<C>)middle;
        Vec<C> size = {};
        for (int64_t g = 0; g < groups; ++g) {
          const Vec<C> x = load_anywhere(largest + g * kBoundColumns + v) - most;
          size += x >= -distance ? Vec<C>{} + 1 : Vec<C>{};
        }
        if (step == 0 && !not_below(size, Vec<C>{} + C(max_nz))) break;  // it is nowhere
        const auto enough = size >= C(max_nz);
        rank = enough ? most - distance : rank;
        far = enough ? middle : far;
        near = enough ? near : middle;
      }
    }
    for (int l = 0; l < kLanes<C> && v + l < end - begin; ++l) {
      const double top = double(most[l]);
      double tau = top + double(low[l]) - double(rounding) * double(groups) * double(scaled[l]);
      if (double(rank[l]) > tau) tau = double(rank[l]);
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
  const int64_t columns = t.cost.matrix ? kCollectColumns : kTile;
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end && all; j += columns)
      all = collect<decltype(stored), decltype(wide)>(t, j, end - j < columns ? end : j + columns, most);
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
