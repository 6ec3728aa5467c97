// jt_apply: y = J^T w for a batch of matrices, sums in double. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct JtApplyTask {  // batch of contiguous rows x cols matrices
  const void* j;
  const double* w;  // batch x rows
  void* y;          // batch x cols
  Element element;
  int64_t batch, rows, cols;
};

constexpr int64_t kJtApplyColumns = 8192;  // at most, of one call: long runs, and sums that stay in the cache
GRADOPS_DECLARE(void, jt_apply_columns, const JtApplyTask&, int64_t item, int64_t begin, int64_t end)

namespace cpu {
void jt_apply(const JtApplyTask&, void* = nullptr);
}
namespace cuda {
void jt_apply(const JtApplyTask&, void* stream);
}
}  // namespace gradops
