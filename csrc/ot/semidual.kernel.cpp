// Columns are finished as many at a time as a vector has lanes: slot r of all of them is one vector. No bit of a result
// depends on which entries beyond its support a column's list holds.
#include "ot/semidual.h"

#include "ot/column_projection.h"
#include "ot/lane_mask.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int W = kLanes<double>;
constexpr int64_t kManyAgain = 16;  // columns for which another pass over all beats a look at each
constexpr int64_t kMostSorted = 32;
constexpr double kInfinity = __builtin_inf();
using Doubles = Vec<double>;

double below(double v) { return v - (__builtin_fabs(v) * 0x1p-50 + 0x1p-1000); }

// Bounds from the entries of an earlier plan, which had gains tau + reg t then; alpha has moved since. Of any set of
// entries, (sum - scaled mass) / size is at most the threshold (Michelot), and the max_nz-th largest at most that of
// all. (If the costs are others now, or the rows not distinct, a bound may be too high: `finish` sees that.)
// Returns how many entries there were.
int64_t warm_bounds(const SemidualColumns& t, int64_t begin, int64_t end) {
  const int64_t n = t.scan.cost.n, most = t.warm_width < t.max_nz ? t.warm_width : t.max_nz;
  double* moved = t.value;
  for (int64_t i = 0; i < n; ++i) moved[i] = t.scan.alpha[i] - t.warm_alpha[i];
  int64_t all = 0;
  for (int64_t j = begin; j < end; ++j) {
    const int64_t* rows = t.warm_index + j * t.warm_width;
    const double *weight = t.warm_weight + j * t.warm_width, tau = t.warm_tau[j];
    double sum = 0, least = kInfinity;
    int64_t used = 0, r = 0;
#if defined(__AVX512F__)
    for (; r + W <= most; r += W) {  // one by one, each waits for the one before
      const __m512d mass = (__m512d)load_anywhere(weight + r);
      __mmask8 there = __mmask8(_mm512_cmp_pd_mask(mass, _mm512_setzero_pd(), _CMP_GT_OQ) | (r == 0));
      there = _mm512_mask_cmplt_epu64_mask(there, _mm512_loadu_si512(rows + r), _mm512_set1_epi64(n));
      const auto by_row = [&](int l) { return moved[there >> l & 1 ? rows[r + l] : 0]; };
      const __m512d by =
          _mm512_setr_pd(by_row(0), by_row(1), by_row(2), by_row(3), by_row(4), by_row(5), by_row(6), by_row(7));
      sum += _mm512_mask_reduce_add_pd(there, by);
      least = lesser(_mm512_mask_reduce_min_pd(there, t.reg * mass + by), least);
      used += __builtin_popcount(there);
    }
#endif
    for (; r < most && (r == 0 || weight[r] > 0) && uint64_t(rows[r]) < uint64_t(n); ++r) {
      const double by = moved[rows[r]], gain = t.reg * weight[r] + by;
      sum += by;
      least = lesser(gain, least);
      ++used;
    }
    all += used;
    const double mean = tau + sum / double(used), all_of_them = used == t.max_nz ? tau + least : -kInfinity;
    double low = mean > all_of_them ? mean : all_of_them;
    low = below(low - (__builtin_fabs(tau) + __builtin_fabs(low) + t.scaled_mass[j]) * 0x1p-48);
    t.scan.low[j] = low < kInfinity ? low : -kInfinity;  // nor NaN
  }
  return all;
}

// x[r]: entry r of every column, -infinity where there is none, up to a multiple of 8.
void load_slots(const double* value, int64_t stride, const int64_t* count, int64_t columns, int64_t slots, Doubles* x) {
  for (int64_t r = 0; r < (slots + 7) / 8 * 8; r += W) {
    Doubles block[W];
    for (int64_t l = 0; l < W; ++l)
      block[l] = load_some(value + l * stride + r, l < columns ? count[l] - r : 0, -kInfinity);
    transpose<double>(block);
    for (int64_t q = 0; q < W; ++q) x[r + q] = block[q];
  }
}

struct Found {
  // tau is relative to largest; gain: <y, t> - reg / 2 |t|^2, times 2 reg, for the same y
  Doubles largest, tau, smallest, gain;
};

// From the largest entries in falling order: bits depend on these alone.
template <int kRanks>
Found sorted(const Doubles* x, int64_t slots, int64_t max_nz, Doubles scaled) {
  Doubles top[kRanks], sum = {}, all = {}, size = Doubles{} + 1, gain = {};
  find_largest<kRanks>((slots + 7) / 8 * 8, [&](int64_t s) { return x[s]; }, top);
  for (int64_t r = 0; r < max_nz; ++r) {
    const Doubles y = top[r] - top[0];
    all += y;
    const auto in = y * double(r + 1) > all - scaled;  // above the threshold of the entries up to this one
    sum = in ? all : sum;
    size = in ? Doubles{} + double(r + 1) : size;
  }
  const Doubles tau = (sum - scaled) / size;
  for (int64_t r = 0; r < max_nz; ++r) {
    const Doubles y = top[r] - top[0];
    gain += y > tau ? (y - tau) * (y + tau) : Doubles{};
  }
  return {top[0], tau, top[max_nz - 1], gain};
}

// From lists of at most max_nz entries. Sets shrink from those above `start`, which must not be above the threshold.
Found shrunk(const Doubles* x, int64_t slots, int64_t max_nz, Doubles scaled, Doubles start) {
  Doubles largest = x[0], smallest = Doubles{} + kInfinity, gain = {}, count = {};
  for (int64_t r = 1; r < slots; ++r) largest = greater(x[r], largest);
  Doubles tau = greater(start - largest, -scaled), last = tau, before = Doubles{} + double(slots) + 1;
  for (int64_t turn = 0; turn <= slots; ++turn) {
    Doubles sum = {}, size = {};
    for (int64_t r = 0; r < slots; ++r) {
      const Doubles y = x[r] - largest;
      sum += y > tau ? y : Doubles{};
      size += y > tau ? Doubles{} + 1 : Doubles{};
    }
    last = (sum - scaled) / size;
    tau = greater(last, tau);                             // never back; a NaN (no entry, no mass) changes nothing
    if (not_below(size, before) == (1u << W) - 1) break;  // it never grows
    before = size;
  }
  for (int64_t r = 0; r < slots; ++r) {
    smallest = x[r] > -kInfinity ? lesser(x[r], smallest) : smallest;
    count += x[r] > -kInfinity ? Doubles{} + 1 : Doubles{};
    const Doubles y = x[r] - largest;
    gain += y > last ? (y - last) * (y + last) : Doubles{};
  }
  smallest = count < double(max_nz) ? Doubles{} - kInfinity : smallest;
  return {largest, last, smallest, gain};  // of the last set alone
}

Found find(const Doubles* x, int64_t slots, int64_t max_nz, Doubles scaled, Doubles start) {
  if (max_nz <= 4) return sorted<4>(x, slots, max_nz, scaled);
  if (max_nz <= 8) return sorted<8>(x, slots, max_nz, scaled);
  if (max_nz <= 16) return sorted<16>(x, slots, max_nz, scaled);
  if (max_nz <= kMostSorted) return sorted<kMostSorted>(x, slots, max_nz, scaled);
  return shrunk(x, slots, max_nz, scaled, start);
}

// Of 16 places of a list, of which the first `count` are taken, those that are at least `smallest` and have a positive
// weight: their weights and rows to the front of `to` and `index`, then zeros, at most `room` in all. Returns how many
// there are. Reads all 16.
constexpr int kPacked = 16;
[[gnu::always_inline]] inline int64_t pack(const double* value, const int32_t* row, int64_t count, double largest,
                                           double tau, double smallest, double reg, int64_t room, double* to,
                                           int64_t* index) {
#if defined(__AVX512DQ__) && defined(__BMI2__)
  const auto first_of = [](int64_t k) { return k <= 0 ? 0u : (1u << (k < 16 ? k : 16)) - 1; };
  const auto weigh = [&](const double* x, __mmask8& wanted) __attribute__((always_inline)) {
    const __m512d v = (__m512d)load_anywhere(x), above = (__m512d)(load_anywhere(x) - largest - tau);  // reg * weight
    wanted = _mm512_cmp_pd_mask(v, _mm512_set1_pd(smallest), _CMP_GE_OQ);
    wanted = _mm512_mask_cmp_pd_mask(wanted, above, _mm512_setzero_pd(), _CMP_GT_OQ);
    return above;
  };
  __mmask8 low, high;
  const __m512d v = weigh(value, low), w = weigh(value + 8, high), scale = _mm512_set1_pd(reg);
  const uint32_t wanted = _cvtmask16_u32(_mm512_kunpackb(high, low)) & first_of(count), places = first_of(room);
  const int kept = __builtin_popcount(wanted);
  const uint32_t used = (1u << kept) - 1;
  // The wanted places' numbers in four bits each. (Compress instructions cost more.)
  const uint64_t order = _pext_u64(0xfedcba9876543210, _pdep_u64(wanted, 0x1111111111111111) * 0xf);
  const __m512i rows = _mm512_loadu_si512(row), all = _mm512_set1_epi64(int64_t(order));
  const __m512i first = _mm512_maskz_cvtepi32_epi64(0xff, _mm512_castsi512_si256(rows));
  const __m512i second = _mm512_maskz_cvtepi32_epi64(0xff, _mm512_maskz_extracti64x4_epi64(0xf, rows, 1));
  const auto put = [&](int from) __attribute__((always_inline)) {  // the permutations look at four bits
    const __m512i shift = _mm512_add_epi64(_mm512_set1_epi64(4 * from), _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28));
    const __m512i at = _mm512_maskz_srlv_epi64(0xff, all, shift);
    const __mmask8 there = __mmask8(used >> from), free = __mmask8(places >> from);
    const __m512d above = _mm512_maskz_permutex2var_pd(there, v, at, w);  // divided when few are left
    _mm512_mask_storeu_pd(to + from, free, _mm512_div_pd(above, scale));
    _mm512_mask_storeu_epi64(index + from, free, _mm512_maskz_permutex2var_epi64(there, first, at, second));
  };
  put(0);
  if (room > 8) put(8);
  return kept;
#elif defined(__AVX2__)
  alignas(32) double weights[2 * kPacked];  // times reg
  alignas(32) int64_t rows[2 * kPacked];
  int64_t kept = 0;
  for (int64_t r = 0; r < kPacked && r < count; r += 4) {
    const __m256d v = _mm256_loadu_pd(value + r);
    const __m256d above = _mm256_sub_pd(_mm256_sub_pd(v, _mm256_set1_pd(largest)), _mm256_set1_pd(tau));
    const __m256d wanted = _mm256_and_pd(_mm256_cmp_pd(v, _mm256_set1_pd(smallest), _CMP_GE_OQ),
                                         _mm256_cmp_pd(above, _mm256_setzero_pd(), _CMP_GT_OQ));
    const __m256d there = _mm256_and_pd(wanted, _mm256_castsi256_pd(first_lanes(count - r)));
    const unsigned bits = unsigned(_mm256_movemask_pd(there));
    const __m256i four = _mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + r)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + kept), to_front(_mm256_castpd_si256(above), bits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + kept), to_front(four, bits));
    kept += __builtin_popcount(bits);
  }
  for (int64_t r = kept; r < kept + kPacked; r += 4) {  // their number is fixed: gcc would make it a call
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + r), _mm256_setzero_si256());
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + r), _mm256_setzero_si256());
  }
  const int64_t places = room < kPacked ? room : kPacked;
  int64_t r = 0;
  for (; r + 4 <= places; r += 4) {
    const __m256d weight = _mm256_div_pd(_mm256_load_pd(weights + r), _mm256_set1_pd(reg));
    _mm256_storeu_pd(to + r, weight);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + r),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(rows + r)));
  }
  for (; r < places; ++r) to[r] = weights[r] / reg, index[r] = rows[r];
  return kept;
#else
  int64_t kept = 0;
  for (int64_t r = 0; r < kPacked && r < count; ++r) {
    const double above = value[r] - largest - tau;
    if (!(above > 0) || value[r] < smallest) continue;
    if (kept < room) to[kept] = above / reg, index[kept] = row[r];
    ++kept;
  }
  for (int64_t r = kept; r < kPacked && r < room; ++r) to[r] = 0, index[r] = 0;
  return kept;
#endif
}

// The entries of column j, of a list of `count`. Returns their number; the first `width` are stored. slots: count or
// more, of the columns around alike, so that the loop does not end where nobody can guess it.
[[gnu::always_inline]] inline int64_t store(const SemidualColumns& t, int64_t j, const double* value,
                                            const int32_t* row, int64_t count, int64_t slots, double largest,
                                            double tau, double smallest) {
  int64_t* index = t.index + j * t.width;
  double* weight = t.weight + j * t.width;
  int64_t kept = 0, written = 0;
  for (int64_t r = 0; r < slots; r += kPacked) {
    written = kept + kPacked;
    kept +=
        pack(value + r, row + r, count - r, largest, tau, smallest, t.reg, t.width - kept, weight + kept, index + kept);
  }
  for (int64_t r = written; r < t.width; ++r) index[r] = 0, weight[r] = 0;
  if (kept > t.width)
    for (int64_t r = 0; r < t.width; ++r) weight[r] = __builtin_nan("");
  return kept;
}

// What is rare: no mass, where the largest entry stands alone, without weight; no entry; more than max_nz entries, as
// the last ones are equal, of which the lowest rows stay.
[[gnu::noinline]] int64_t store_rare(const SemidualColumns& t, int64_t j, double* value, int32_t* row, int64_t count,
                                     double largest, double tau, double smallest) {
  if (t.b[j] > 0 && count > 0) {
    keep_largest(value, row, count, t.max_nz);
    return store(t, j, value, row, t.max_nz, t.max_nz, largest, tau, smallest);
  }
  for (int64_t r = 0; r < t.width; ++r) t.index[j * t.width + r] = 0, t.weight[j * t.width + r] = 0;
  if (count == 0) return 0;
  while (*value < largest) ++value, ++row;
  if (t.width > 0) t.index[j * t.width] = *row;
  return 1;
}

// Up to W columns from their lists; that of column j + l is at l * room. Adds to `again` those that these do not
// decide, with the bound that they give; without `again`, they do. False: a NaN, or an infinite gain.
bool finish(const SemidualColumns& t, int64_t j, int64_t columns, double* value, int32_t* row, int64_t room,
            const int32_t* wanted, int64_t* again, int64_t& agains) {
  int64_t count[W] = {}, slots = 1;
  for (int64_t l = 0; l < columns; ++l) {
    count[l] = wanted[l] < room ? wanted[l] : room;
    if (count[l] > t.max_nz && t.max_nz > kMostSorted) {
      for (int64_t r = l * room; r < l * room + count[l]; ++r)
        if (!(value[r] < kInfinity)) return false;
      keep_largest(value + l * room, row + l * room, count[l], t.max_nz);
      count[l] = t.max_nz;
    }
    slots = count[l] > slots ? count[l] : slots;
  }
  Doubles* x = reinterpret_cast<Doubles*>(t.slots);
  load_slots(value, room, count, columns, slots, x);
  uint64_t bad = 0;
  for (int64_t r = 0; r < slots; ++r) bad |= not_below(x[r], Doubles{} + kInfinity);
  if (bad) return false;
  const Doubles mass = load_some(t.b + j, columns, 0), low = load_some(t.scan.low + j, columns, 0);
  const Found found = find(x, slots, t.max_nz, t.reg * mass, low);
  const Doubles nothing = Doubles{} - kInfinity, largest = found.largest, smallest = found.smallest;
  const auto fills = (mass > 0) & (largest > nothing);
  const Doubles tau = fills ? largest + found.tau : largest;
  const Doubles omega = fills ? mass * largest + .5 * found.gain / t.reg : mass > 0 ? nothing : Doubles{};
  const uint64_t filled = ~not_below(Doubles{}, mass) & ~not_below(nothing, largest);
  const uint64_t decided = again ? not_below(tau, low) | ~not_below(low, smallest) : ~uint64_t(0);
  store_some(t.tau + j, columns, tau);
  store_some(t.omega + j, columns, omega);
  for (int64_t l = 0; l < columns; ++l) {
    const int64_t c = j + l, at = l * room;
    if (again && (wanted[l] > room || !(decided >> l & 1))) {
      t.scan.low[c] = below(tau[l] > smallest[l] ? tau[l] : smallest[l]);  // what was found is a set of entries
      again[agains++] = c;
      continue;
    }
    int64_t kept = t.max_nz + 1;
    if (filled >> l & 1)
      kept = store(t, c, value + at, row + at, count[l], slots, largest[l], found.tau[l], smallest[l]);
    if (kept > t.max_nz) kept = store_rare(t, c, value + at, row + at, count[l], largest[l], found.tau[l], smallest[l]);
    t.kept[c] = kept;
  }
  return true;
}

bool finish(const SemidualColumns& t, int64_t j, int64_t columns, int64_t* again, int64_t& agains) {
  const ColumnScan& s = t.scan;
  return finish(t, j, columns, s.value + j * s.capacity, s.index + j * s.capacity, s.capacity, s.count + j, again,
                agains);
}

// All rows of one column once more, from a bound that cannot be too high.
bool look_again(const SemidualColumns& t, int64_t j) {
  int32_t count = 0;
  for (int64_t i = 0; i < t.scan.cost.n; ++i) {
    const double v = t.scan.alpha[i] - cost_at(t.scan.cost, i, j);
    t.row[count] = int32_t(i);
    t.value[count] = v;
    count += !(v <= t.scan.low[j]);
  }
  int64_t none = 0;
  return finish(t, j, 1, t.value, t.row, t.scan.cost.n, &count, nullptr, none);
}

}  // namespace

int64_t semidual_columns(const SemidualColumns& t, int64_t begin, int64_t end) {
  const ColumnScan& s = t.scan;
  for (int64_t j = begin; j < end; ++j) t.scaled_mass[j] = t.reg * t.b[j];
  bool scanned = false;
  double low[kMostColumns];
  if (t.warm_index) {
    ColumnScan warm = s;
    warm.most = 4 * warm_bounds(t, begin, end) + 16 * (end - begin);
    for (int64_t j = begin; j < end; ++j) low[j - begin] = s.low[j];
    scanned = scan_columns(warm, begin, end);  // no: alpha has moved far
  }
  if (!scanned) {
    scan_bounds(s, t.scaled_mass, t.max_nz, begin, end);
    for (int64_t j = begin; j < end; ++j)
      if (t.warm_index && low[j - begin] > s.low[j]) s.low[j] = low[j - begin];
    scan_columns(s, begin, end);
  }
  int64_t again[kMostColumns], agains = 0;
  for (int64_t j = begin; j < end; j += W)
    if (!finish(t, j, end - j < W ? end - j : W, again, agains)) return j;
  for (int pass = 0; pass < 3 && agains >= kManyAgain; ++pass) {
    const int64_t before = agains;
    for (int64_t k = 0; k < before; ++k) low[k] = s.low[again[k]];
    if (pass == 0) scan_bounds(s, t.scaled_mass, t.max_nz, begin, end);
    for (int64_t j = begin, k = 0; j < end; ++j) {
      if (k == before || again[k] != j)
        s.low[j] = kInfinity;  // done
      else if (!(s.low[j] > low[k++]) || pass > 0)
        s.low[j] = low[k - 1];
    }
    scan_columns(s, begin, end);
    agains = 0;
    for (int64_t k = 0; k < before; ++k)
      if (!finish(t, again[k], 1, again, agains)) return again[k];
  }
  for (int64_t k = 0; k < agains; ++k)
    if (!look_again(t, again[k])) return again[k];
  return -1;
}

}  // namespace gradops::GRADOPS_ISA
