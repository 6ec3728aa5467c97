#include "ot/semidual.h"

#include "ot/column_projection.h"

namespace gradops::GRADOPS_ISA {
namespace {

double below(double v) { return v - (__builtin_fabs(v) * 0x1p-50 + 0x1p-1000); }

// From the rows of an earlier support: any set of entries gives a threshold, and a max_nz-th largest entry, that are at
// most those of all entries.
double warm_bound(const SemidualColumns& t, int64_t j) {
  const int64_t* rows = t.warm + j * t.warm_width;
  const double infinity = __builtin_inf(), scaled = t.scaled_mass[j];
  double *x = t.value, largest = -infinity, least = infinity;
  int64_t count = 0;
  const int64_t most = t.warm_width < t.max_nz ? t.warm_width : t.max_nz;
  for (; count < most; ++count) {
    const int64_t i = rows[count];
    if (i < 0 || i >= t.scan.cost.n || (count > 0 && i <= rows[count - 1])) break;  // distinct rows, or no bound
    x[count] = t.scan.alpha[i] - cost_at(t.scan.cost, i, j);
    largest = x[count] > largest ? x[count] : largest;
    least = x[count] < least ? x[count] : least;
  }
  double tau = -scaled;
  int64_t kept = count;
  for (int64_t turn = 0; turn < 4; ++turn) {
    double sum = 0;
    int64_t size = 0;
    for (int64_t r = 0; r < count; ++r) {
      const double y = x[r] - largest;
      sum += y > tau ? y : 0;
      size += y > tau;
    }
    if (size == 0) break;
    const double higher = (sum - scaled) / double(size);
    tau = higher > tau ? higher : tau;
    if (size == kept) break;
    kept = size;
  }
  double low = largest + tau - (scaled - tau) * 0x1p-50;
  if (count == t.max_nz && least > low) low = least;
  low = below(low);
  return low > -infinity && low < infinity ? low : -infinity;
}

bool usable(const double* x, int64_t count) {  // neither NaN nor +infinity
  bool good = true;
  for (int64_t r = 0; r < count; ++r) good &= x[r] < __builtin_inf();
  return good;
}

// Whether the entries above low decided about the column.
bool decided(const ProjectedColumn& p, double low) { return p.tau >= low || p.smallest > low; }

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
bool look_again(const SemidualColumns& t, int64_t j, double low) {
  int64_t count = 0;
  for (int64_t i = 0; i < t.scan.cost.n; ++i) {
    const double v = t.scan.alpha[i] - cost_at(t.scan.cost, i, j);
    if (v <= low) continue;
    t.row[count] = int32_t(i);
    t.value[count++] = v;
  }
  if (!usable(t.value, count)) return false;
  store(t, j, project_column(t.value, t.row, count, t.max_nz, t.reg, t.b[j]), t.value, t.row);
  return true;
}

}  // namespace

int64_t semidual_columns(const SemidualColumns& t, int64_t begin, int64_t end) {
  const ColumnScan& s = t.scan;
  for (int64_t j = begin; j < end; ++j) t.scaled_mass[j] = t.reg * t.b[j];
  if (t.warm)
    for (int64_t j = begin; j < end; ++j) s.low[j] = warm_bound(t, j);
  else
    scan_bounds(s, t.scaled_mass, t.max_nz, begin, end);
  scan_columns(s, begin, end);
  for (int64_t j = begin; j < end; ++j) {
    const int64_t all = s.count[j], count = all < s.capacity ? all : s.capacity;
    double* x = s.value + j * s.capacity;
    int32_t* row = s.index + j * s.capacity;
    if (!usable(x, count)) return j;
    const ProjectedColumn p = project_column(x, row, count, t.max_nz, t.reg, t.b[j]);
    if (all <= s.capacity && decided(p, s.low[j])) {
      store(t, j, p, x, row);
      continue;
    }
    // What was found is a set of entries: it bounds the rest.
    if (!look_again(t, j, below(p.tau > p.smallest ? p.tau : p.smallest))) return j;
  }
  return -1;
}

}  // namespace gradops::GRADOPS_ISA
