#include "ot/column_scan.h"

namespace gradops::GRADOPS_ISA {
namespace {

// Just below v.
double below(double v) { return v - (__builtin_fabs(v) * 0x1p-52 + 0x1p-1022); }

}  // namespace

void scan_columns(const ColumnScan& t, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) t.count[j] = 0;
  for (int64_t i = 0; i < t.cost.n; ++i)
    for (int64_t j = begin; j < end; ++j) {
      const double v = t.alpha[i] - cost_at(t.cost, i, j);
      if (v <= t.low[j]) continue;
      const int64_t at = t.count[j]++;
      if (at >= t.capacity) continue;
      t.index[j * t.capacity + at] = int32_t(i);
      if (t.value) t.value[j * t.capacity + at] = v;
    }
}

void scan_bounds(const ColumnScan& t, const double* scaled_mass, int64_t, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) t.low[j] = -__builtin_inf();
  for (int64_t i = 0; i < t.cost.n; ++i)
    for (int64_t j = begin; j < end; ++j) {
      const double v = t.alpha[i] - cost_at(t.cost, i, j);
      if (v > t.low[j]) t.low[j] = v;
    }
  for (int64_t j = begin; j < end; ++j) t.low[j] = below(t.low[j] - scaled_mass[j]);  // one entry takes all the mass
}

}  // namespace gradops::GRADOPS_ISA
