// Columns are finished as many at a time as a vector has lanes: slot r of all of them is one vector.
#include "ot/semidual.h"

#include "ot/column_projection.h"
#include "ot/lane_mask.h"

namespace gradops::GRADOPS_ISA {
namespace {

constexpr int W = kLanes<double>;
constexpr int64_t kManyAgain = 16;  // columns for which another pass over all beats a look at each
constexpr int64_t kRanksAtOnce = 32;
using Doubles = Vec<double>;

double below(double v) { return v - (__builtin_fabs(v) * 0x1p-50 + 0x1p-1000); }

struct Thresholds {
  Doubles largest, tau;  // tau is relative to largest
};

// Each column's threshold for its mass, from below: of a set that holds the support, (sum - scaled mass) / size is at
// most the threshold (Michelot). -infinity is no entry.
Thresholds threshold(const Doubles* x, int64_t slots, Doubles scaled) {
  Doubles largest = x[0];
  for (int64_t r = 1; r < slots; ++r) largest = greater(x[r], largest);
  Doubles tau = -scaled, before = Doubles{} + double(slots) + 1;
  for (int64_t turn = 0; turn <= slots; ++turn) {
    Doubles sum = {}, size = {}, sum2 = {}, size2 = {};  // in two chains, for speed
    for (int64_t r = 0; r < slots; r += 2) {
      const Doubles y = x[r] - largest, z = r + 1 < slots ? x[r + 1] - largest : -scaled;
      sum += y > tau ? y : Doubles{};
      size += y > tau ? Doubles{} + 1 : Doubles{};
      sum2 += z > tau ? z : Doubles{};
      size2 += z > tau ? Doubles{} + 1 : Doubles{};
    }
    sum += sum2;
    size += size2;
    const Doubles higher = (sum - scaled) / size;
    tau = greater(higher, tau);                           // never back; a NaN (no entry, no mass) changes nothing
    if (not_below(size, before) == (1u << W) - 1) break;  // it never grows
    before = size;
  }
  return {largest, tau};
}

// Bounds for W columns from j on: of entries that had gains tau + reg t then, alpha has moved since. The threshold of
// any set of entries, and its max_nz-th largest, are at most those of all. (If the costs are others now, the bound may
// be too high: `finish` sees that.)
void warm_bounds(const SemidualColumns& t, int64_t j, int64_t columns) {
  const int64_t most = t.warm_width < t.max_nz ? t.warm_width : t.max_nz;
  Doubles *x = reinterpret_cast<Doubles*>(t.value), scaled = {}, least = Doubles{} + __builtin_inf();
  int64_t count[W] = {};
  for (int64_t r = 0; r < most; ++r) x[r] = Doubles{} - __builtin_inf();
  for (int64_t l = 0; l < columns; ++l) {
    const int64_t* rows = t.warm_index + (j + l) * t.warm_width;
    const double* weight = t.warm_weight + (j + l) * t.warm_width;
    double* to = reinterpret_cast<double*>(x) + l;
    const double tau = t.warm_tau[j + l];
    int64_t r = 0;
    for (int64_t last = -1; r < most && rows[r] > last && rows[r] < t.scan.cost.n; ++r) {  // distinct rows
      last = rows[r];
      to[r * W] = tau + t.reg * weight[r] + (t.scan.alpha[last] - t.warm_alpha[last]);
    }
    count[l] = r;
    scaled[l] = t.scaled_mass[j + l];
  }
  const Thresholds found = threshold(x, most, scaled);
  for (int64_t r = 0; r < most; ++r) least = lesser(x[r], least);
  for (int64_t l = 0; l < columns; ++l) {
    double low = found.largest[l] + found.tau[l] - scaled[l] * 0x1p-48;
    if (count[l] == t.max_nz && least[l] > low) low = least[l];
    low -= (__builtin_fabs(t.warm_tau[j + l]) + __builtin_fabs(low)) * 0x1p-48;
    low = below(low);
    t.scan.low[j + l] = low > -__builtin_inf() && low < __builtin_inf() ? low : -__builtin_inf();
  }
}

bool usable(const double* x, int64_t count) {  // neither NaN nor +infinity
  bool good = true;
  for (int64_t r = 0; r < count; ++r) good &= x[r] < __builtin_inf();
  return good;
}

void store(const SemidualColumns& t, int64_t j, const ProjectedColumn& p, const double* weight, const int32_t* row) {
  for (int64_t r = 0; r < t.width; ++r) {
    t.index[j * t.width + r] = r < p.kept ? row[r] : 0;
    t.weight[j * t.width + r] = r < p.kept ? weight[r] : 0;
  }
  t.kept[j] = p.kept;
  t.tau[j] = p.tau;
  t.omega[j] = p.value;
}

// All rows of one column once more, from a bound that cannot be too high.
bool look_again(const SemidualColumns& t, int64_t j) {
  int64_t count = 0;
  for (int64_t i = 0; i < t.scan.cost.n; ++i) {
    const double v = t.scan.alpha[i] - cost_at(t.scan.cost, i, j);
    if (v <= t.scan.low[j]) continue;
    t.row[count] = int32_t(i);
    t.value[count++] = v;
  }
  if (!usable(t.value, count)) return false;
  store(t, j, project_column(t.value, t.row, count, t.max_nz, t.reg, t.b[j]), t.value, t.row);
  return true;
}

// The ranks-th largest of every lane, and no other: one insertion per slot.
Doubles ranked(const Doubles* x, int64_t slots, int64_t ranks) {
  Doubles top[kRanksAtOnce];
  for (int64_t r = 0; r < ranks; ++r) top[r] = Doubles{} - __builtin_inf();
  for (int64_t s = 0; s < slots; ++s) insert<double>(x[s], top, ranks);
  return top[ranks - 1];
}

// W columns from their lists. Adds to `again` those that these do not decide, with the bound that they give.
bool finish(const SemidualColumns& t, int64_t j, int64_t columns, int64_t* again, int64_t& agains) {
  const ColumnScan& s = t.scan;
  int64_t count[W] = {}, slots = 0;
  Doubles *x = reinterpret_cast<Doubles*>(t.value), scaled = {};
  for (int64_t l = 0; l < columns; ++l) {
    count[l] = s.count[j + l] < s.capacity ? s.count[j + l] : s.capacity;
    slots = count[l] > slots ? count[l] : slots;
    scaled[l] = t.scaled_mass[j + l];
  }
  const bool alone = slots > t.max_nz && t.max_nz > kRanksAtOnce;
  const int64_t most = slots > 0 ? slots : 1;
  for (int64_t r = 0; r < most; ++r) x[r] = Doubles{} - __builtin_inf();
  for (int64_t l = 0; l < columns; ++l) {
    const double* value = s.value + (j + l) * s.capacity;
    double* to = reinterpret_cast<double*>(x) + l;
    for (int64_t r = 0; r < count[l]; ++r) to[r * W] = value[r];
  }
  uint64_t bad = 0;
  for (int64_t r = 0; r < most; ++r) bad |= not_below(x[r], Doubles{} + __builtin_inf());
  if (bad) return false;  // NaN, or an infinite gain
  Doubles least = Doubles{} + __builtin_inf(), omega = {}, size = {};
  if (slots > t.max_nz && !alone) {
    const Doubles enough = ranked(x, most, t.max_nz);
    for (int64_t r = 0; r < most; ++r) {
      size += x[r] >= enough ? Doubles{} + 1 : Doubles{};
      x[r] = x[r] >= enough ? x[r] : Doubles{} - __builtin_inf();
    }
  }
  Thresholds found = {};
  if (!alone) {
    found = threshold(x, most, scaled);
    for (int64_t r = 0; r < most; ++r) {
      least = (x[r] < least) & (x[r] > -__builtin_inf()) ? x[r] : least;
      const Doubles y = x[r] - found.largest, weight = greater((y - found.tau) / t.reg, Doubles{});
      omega += y > found.tau ? weight * (y - .5 * t.reg * weight) : Doubles{};
      x[r] = weight;
    }
  }
  for (int64_t l = 0; l < columns; ++l) {
    const int64_t c = j + l, all = s.count[c];
    int32_t* row = s.index + c * s.capacity;
    ProjectedColumn p;
    // Mass of 0, and more than max_nz entries where the last ones are equal, are left to the scalar code.
    const bool scalar = alone || !(t.b[c] > 0) || count[l] == 0 || (count[l] > t.max_nz && size[l] > double(t.max_nz));
    if (scalar) {
      p = project_column(s.value + c * s.capacity, row, count[l], t.max_nz, t.reg, t.b[c]);
    } else {
      p = {0, found.largest[l] + found.tau[l], count[l] < t.max_nz ? -__builtin_inf() : least[l],
           omega[l] + t.b[c] * found.largest[l]};
    }
    if (all > s.capacity || !(p.tau >= s.low[c] || p.smallest > s.low[c])) {
      s.low[c] = below(p.tau > p.smallest ? p.tau : p.smallest);  // what was found is a set of entries
      again[agains++] = c;
      continue;
    }
    if (scalar) {
      store(t, c, p, s.value + c * s.capacity, row);
      continue;
    }
    const double* weight = reinterpret_cast<const double*>(x) + l;
    int64_t* index_out = t.index + c * t.width;
    double* weight_out = t.weight + c * t.width;
    for (int64_t r = 0; r < count[l]; ++r) {
      if (p.kept < t.width) index_out[p.kept] = row[r], weight_out[p.kept] = weight[r * W];
      p.kept += weight[r * W] > 0;
    }
    for (int64_t r = p.kept; r < t.width; ++r) index_out[r] = 0, weight_out[r] = 0;
    t.kept[c] = p.kept;
    t.tau[c] = p.tau;
    t.omega[c] = p.value;
  }
  return true;
}

}  // namespace

int64_t semidual_columns(const SemidualColumns& t, int64_t begin, int64_t end) {
  const ColumnScan& s = t.scan;
  for (int64_t j = begin; j < end; ++j) t.scaled_mass[j] = t.reg * t.b[j];
  if (t.warm_index)
    for (int64_t j = begin; j < end; j += W) warm_bounds(t, j, end - j < W ? end - j : W);
  else
    scan_bounds(s, t.scaled_mass, t.max_nz, begin, end);
  int64_t again[kMostColumns], agains = 0;
  scan_columns(s, begin, end);
  for (int64_t j = begin; j < end; j += W)
    if (!finish(t, j, end - j < W ? end - j : W, again, agains)) return j;
  for (int pass = 0; pass < 3 && agains >= kManyAgain; ++pass) {
    double low[kMostColumns];
    const int64_t before = agains;
    for (int64_t k = 0; k < before; ++k) low[k] = s.low[again[k]];
    if (pass == 0) scan_bounds(s, t.scaled_mass, t.max_nz, begin, end);
    for (int64_t j = begin, k = 0; j < end; ++j) {
      if (k == before || again[k] != j)
        s.low[j] = __builtin_inf();  // done
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
