// semidual: the semi-dual objective of optimal transport with a quadratic regulariser and at most max_nz entries per
// column,  D(alpha) = <alpha, a> - sum_j omega_j(alpha - c_j),  its gradient a - T 1, and the plan T. Torch-free
// interface.
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "ot/column_scan.h"

namespace gradops {

struct SemidualTask {  // a batch of problems; every array has the batch in front
  const void *matrix, *x, *y;
  Element element;
  int64_t batch, n, m, d;
  const double *alpha, *a, *b;  // n, n, m
  double reg;
  int64_t max_nz;  // n for no bound
  // What an earlier call gave at warm_alpha: columns of warm_width entries, rows ascending; or null.
  const double* warm_alpha;
  const int64_t* warm_index;
  const double *warm_weight, *warm_tau;
  int64_t warm_width;
  double *value, *grad;  // 1, n
  int64_t width;         // of the plan: entries of a column that are stored
  int64_t* index;        // (m, width), ascending; 0 where unused
  double* weight;        // (m, width); 0 where unused; NaN where a column needs more than width
  double* tau;           // m
  int64_t* kept;         // m: entries of the column, stored or not; its one entry has weight 0 where b is 0
};

namespace {

GRADOPS_SHARED Cost cost_of(const SemidualTask& t, int64_t item, int64_t size_of_number) {
  const int64_t bytes = item * size_of_number;
  const char *matrix = static_cast<const char*>(t.matrix), *x = static_cast<const char*>(t.x),
             *y = static_cast<const char*>(t.y);
  return {matrix ? matrix + bytes * t.n * t.m : nullptr,
          matrix ? nullptr : x + bytes * t.n * t.d,
          matrix ? nullptr : y + bytes * t.m * t.d,
          t.element,
          t.n,
          t.m,
          t.d};
}

}  // namespace

struct SemidualColumns {  // of one item
  ColumnScan scan;        // its lists belong to the columns of one call; 16 more than these are read
  const double* b;
  double reg;
  int64_t max_nz;
  const double* warm_alpha;
  const int64_t* warm_index;
  const double *warm_weight, *warm_tau;
  int64_t warm_width, width;
  int64_t* index;
  double *weight, *tau;
  int64_t* kept;
  double* omega;        // m
  double* scaled_mass;  // m
  double* slots;        // aligned: 8 for every entry of a list, n at least: of the columns that are being finished
  double* value;        // n and 16 more
  int32_t* row;         // n and 16 more
};
constexpr int64_t kMostColumns = 1024;  // of a call
// The first column with a NaN or an infinite gain, or -1.
GRADOPS_DECLARE(int64_t, semidual_columns, const SemidualColumns&, int64_t begin, int64_t end)

namespace cpu {
void semidual(const SemidualTask&, void* workspace, void* = nullptr);
int64_t semidual_workspace(const SemidualTask&);  // bytes
}  // namespace cpu
namespace cuda {
void semidual(const SemidualTask&, void* workspace, void* stream);
int64_t semidual_workspace(const SemidualTask&);
}  // namespace cuda
}  // namespace gradops
