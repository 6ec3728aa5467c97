// row_norm: y[i, :] = x[i, :] / (||x[i, :]||_2 + eps), row by row; a zero row stays zero.
// With `center`, the mean over the rows is subtracted before, and again after. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct RowNormTask {  // batch of contiguous rows x cols matrices
  const void* x;
  void* y;
  Element element;
  int64_t batch, rows, cols;
  double eps;
  bool center;
};

// Inner loops over rows [begin, end) of one matrix. Means and sums: one double per column.
struct RowNormRows {
  const void* x;
  void* y;
  Element element;
  int64_t cols;
  double eps;
};
// sum[c] = sum over the rows of x
GRADOPS_DECLARE(void, row_norm_sum, const RowNormRows&, int64_t begin, int64_t end, double* sum)
// inverse[r] = 1 / (||x[r] - mean|| + eps); sum[c] = sum over the rows of (x - mean) * inverse
GRADOPS_DECLARE(void, row_norm_measure, const RowNormRows&, int64_t begin, int64_t end, const double* mean,
                double* inverse, double* sum)
// y = (x - mean) * inverse - mean_after
GRADOPS_DECLARE(void, row_norm_write, const RowNormRows&, int64_t begin, int64_t end, const double* mean,
                const double* inverse, const double* mean_after)
// y = x / (||x|| + eps), without centering
GRADOPS_DECLARE(void, row_norm_plain, const RowNormRows&, int64_t begin, int64_t end)

namespace cpu {
void row_norm(const RowNormTask&, void* workspace, void* = nullptr);
int64_t row_norm_workspace(const RowNormTask&);  // bytes
}  // namespace cpu
namespace cuda {
void row_norm(const RowNormTask&, void* workspace, void* stream);
int64_t row_norm_workspace(const RowNormTask&);
}  // namespace cuda
}  // namespace gradops
