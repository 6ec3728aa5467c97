// column_scan: which entries of each column of x_ij = alpha_i - c_ij can matter, in one pass over the costs.
// Vectors run across columns, so that a matrix is read as it lies.
#pragma once
#include "common/isa.h"
#include "ot/cost.h"

namespace gradops {

struct ColumnScan {  // of one problem
  Cost cost;
  const double* alpha;  // n, finite
  double* low;          // m
  int32_t* index;       // m x capacity: rows of the wanted entries, ascending
  int32_t* count;       // m: how many are wanted; only the first `capacity` are stored
  int64_t capacity;
  double* value;  // m x capacity: of the wanted entries alpha_i - c_ij, or if `costs` c_ij - shift; in double
  bool costs = false;
  double shift = 0;
  int64_t most = int64_t(1) << 62;
};

// An entry is wanted where alpha_i - c_ij > low_j, or is NaN. Rounding may add entries that are not above low_j, never
// leave one out that is. False, with lists that do not count, where soon more than `most` entries are wanted.
GRADOPS_DECLARE(bool, scan_columns, const ColumnScan&, int64_t begin, int64_t end)
// For a cold start: low_j below everything that project_column (column_projection.h) could keep for the mass
// scaled_mass[j] / reg, where scaled_mass[j] = reg * b_j. -infinity for a column without a finite entry.
GRADOPS_DECLARE(void, scan_bounds, const ColumnScan&, const double* scaled_mass, int64_t max_nz, int64_t begin,
                int64_t end)

}  // namespace gradops
