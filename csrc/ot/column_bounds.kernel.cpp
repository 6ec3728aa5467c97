// scan_bounds. Rows are dealt to sets as cards are, and of every set the largest entry of each column is found. The
// k-th largest of these, and the threshold that they alone would have, are below those of the whole column; not by
// much, as a column's largest entries are often those of neighbouring rows, which are in different sets.
#include "ot/column_scan.h"
#include "ot/cost_rows.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int kStripVectors = 8;  // whose largest entries stay in registers
template <class C>
constexpr int kStrip = kStripVectors * kLanes<C>;
constexpr int kBoundColumns = 128;  // of a pass over the rows
static_assert(kBoundColumns % kStrip<float> == 0 && kBoundColumns % kTile == 0);
constexpr int64_t kMostSets = 256, kAhead = 6;

// Of a strip of columns the largest entry of each set of rows.
template <class T, class C>
void largest_of_strip(const ColumnScan& t, int64_t begin, int64_t end, int64_t sets, C* largest) {
  const int64_t n = t.cost.n, m = t.cost.m, columns = end - begin < kStrip<C> ? end - begin : kStrip<C>;
  const int64_t rounds = (n + sets - 1) / sets * sets;
  const T* matrix = static_cast<const T*>(t.cost.matrix) + begin;
  alignas(64) T some[kStrip<C>];
  for (int64_t l = columns; l < kStrip<C>; ++l) narrow(C(__builtin_inf()), some[l]);
  for (int64_t g = 0; g < sets; ++g) {
    Vec<C> most[kStripVectors];
    for (auto& v : most) v = Vec<C>{} - C(__builtin_inf());
    for (int64_t i = g; i < n; i += sets) {
      const T* c = matrix + i * m;
      const int64_t later = i + kAhead * sets;  // the processor does not foresee these. (Past the end it does nothing.)
      const T* ahead = matrix + (later < rounds ? later : later - rounds + 1) * m;
      for (size_t e = 0; e < kStrip<C>; e += 64 / sizeof(T)) __builtin_prefetch(ahead + e);
      if (columns < kStrip<C>) {
        for (int64_t l = 0; l < columns; ++l) some[l] = c[l];
        c = some;
      }
      const C alpha = C(t.alpha[i]);
      for (int v = 0; v < kStripVectors; ++v) {
        const Vec<C> x = alpha - load_wide(c + v * kLanes<C>);
        most[v] = greater(x, most[v]);
      }
    }
    for (int v = 0; v < kStripVectors; ++v) store_anywhere(largest + g * kBoundColumns + v * kLanes<C>, most[v]);
  }
}

template <class T, class C>
void largest_of_points(const ColumnScan& t, int64_t begin, int64_t end, int64_t sets, C* largest) {
  for (int64_t e = 0; e < sets * kBoundColumns; ++e) largest[e] = -C(__builtin_inf());
  each_row<T, C>(
      t.cost, begin, end, true, [&](int64_t i) { return C(t.alpha[i]); },
      [&](int64_t i, C alpha, int64_t j, int64_t tiles, const auto* c) {
        C* to = largest + (i & (sets - 1)) * kBoundColumns + (j - begin);
        for (int64_t v = 0; v < tiles * kTile; v += kLanes<C>) {
          const Vec<C> x = alpha - load_wide(c + v), old = load_anywhere(to + v), now = greater(x, old);
          store_anywhere(to + v, now);
        }
        return true;
      });
}

template <int kRanks, class C>
void bound_from(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end,
                int64_t sets, const C* largest) {
  const C rounding = sizeof(C) == 8 ? C(0x1p-50) : C(0x1p-21);
  for (int64_t v = 0; v < end - begin; v += kLanes<C>) {
    const auto x = [&](int64_t g)
                       __attribute__((always_inline)) { return load_anywhere(largest + g * kBoundColumns + v); };
    Vec<C> top[kRanks], scaled = {}, sum = {};
    find_largest<kRanks>(sets, x, top);
    for (int l = 0; l < kLanes<C> && v + l < end - begin; ++l) scaled[l] = C(scaled_mass[begin + v + l]);
    // Of any set of entries, (sum - scaled mass) / size is at most the threshold (Michelot).
    const Vec<C> most = top[0];
    Vec<C> low = -scaled;  // relative to the largest: one entry takes all the mass
    const int64_t ranks = max_nz < kRanks ? max_nz : kRanks;
    for (int64_t r = 1; r < ranks; ++r) {
      sum += top[r] - most;
      low = greater((sum - scaled) / C(r + 1), low);
    }
    bool more = max_nz > kRanks && not_below(top[kRanks - 1] - most, low);  // rank kRanks may not be the last
    for (int step = 0; step < 6 && more; ++step) {
      Vec<C> all = {}, size = {};
      for (int64_t g = 0; g < sets; ++g) {
        const Vec<C> y = x(g) - most;
        all += y >= low ? y : Vec<C>{};
        size += y >= low ? Vec<C>{} + 1 : Vec<C>{};
      }
      const Vec<C> higher = (all - scaled) / size;
      more = not_below(higher, low + C(0x1p-7) * scaled);
      low = greater(higher, low);
    }
    Vec<C> rank = Vec<C>{} - C(__builtin_inf());
    if (max_nz <= kRanks) {
      rank = top[max_nz - 1];
    } else if (max_nz <= sets) {
      // Many ranks: up to a hundredth before the max_nz-th largest's distance from the largest, where it is above
      // `low`. Halves what lies between in the order of the bits, so that numbers of any size may be among the entries.
      using Bits = Vec<std::conditional_t<sizeof(C) == 4, uint32_t, uint64_t>>;
      Bits far = (Bits)-low, near = {};
      for (int step = 0; step < 14; ++step) {
        const Bits middle = step == 0 ? far : near + (far - near) / 2;
        const Vec<C> distance = (Vec<C>)middle;
        Vec<C> size = {};
        for (int64_t g = 0; g < sets; ++g) size += x(g) - most >= -distance ? Vec<C>{} + 1 : Vec<C>{};
        if (step == 0 && !not_below(size, Vec<C>{} + C(max_nz))) break;  // it is nowhere
        const auto enough = size >= C(max_nz);
        rank = enough ? most - distance : rank;
        far = enough ? middle : far;
        near = enough ? near : middle;
      }
    }
    for (int l = 0; l < kLanes<C> && v + l < end - begin; ++l) {
      const double top = double(most[l]);
      double tau = top + double(low[l]) - double(rounding) * double(sets) * double(scaled[l]);
      if (double(rank[l]) > tau) tau = double(rank[l]);
      const double size = __builtin_fabs(tau) + __builtin_fabs(top);
      tau -= double(rounding) * size + 0x1p-120;
      t.low[begin + v + l] = tau == tau ? tau : -__builtin_inf();
    }
  }
}

template <class T, class C>
void bound(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  const int64_t sought = max_nz < kMostSets / 2 ? 4 * max_nz : t.cost.n / 4 < 128 ? t.cost.n / 4 : 128;
  const int64_t sets = sought <= 64 ? 64 : sought <= 128 ? 128 : kMostSets;  // a row's is found without a division
  alignas(64) C largest[kMostSets * kBoundColumns];
  if (t.cost.matrix)
    for (int64_t j = begin; j < end; j += kStrip<C>) largest_of_strip<T>(t, j, end, sets, largest + (j - begin));
  else
    largest_of_points<T>(t, begin, end, sets, largest);
  const int64_t used = t.cost.n < sets ? (t.cost.n + 7) / 8 * 8 : sets;
  const auto from = max_nz <= 4                   ? bound_from<4, C>
                    : max_nz <= 8                 ? bound_from<8, C>
                    : max_nz <= 16 || max_nz > 32 ? bound_from<16, C>
                                                  : bound_from<32, C>;
  from(t, scaled_mass, max_nz, begin, end, used, largest);
}

}  // namespace

void scan_bounds(const ColumnScan& t, const double* scaled_mass, int64_t max_nz, int64_t begin, int64_t end) {
  with_arithmetic(t.cost.element, [&](auto stored, auto wide) {
    for (int64_t j = begin; j < end; j += kBoundColumns)
      bound<decltype(stored), decltype(wide)>(t, scaled_mass, max_nz, j,
                                              end - j < kBoundColumns ? end : j + kBoundColumns);
  });
}

}  // namespace gradops::GRADOPS_ISA
