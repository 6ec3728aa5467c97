// row_normalize: y[r, :] = x[r, :] / (||x[r, :]||_2 + eps). Torch-free interface.
#pragma once
#include <cstdint>

#include "common/isa.h"

// Rows may be x_stride elements apart; columns are contiguous. inv_norm (one per
// row, 1 / (||x|| + eps)) is kept for the backward pass.
#define GRADOPS_ROW_NORMALIZE_ARGS                                                              \
  const float *x, int64_t x_stride, float *y, float *inv_norm, int64_t rows, int64_t cols, \
      float eps

namespace gradops {
GRADOPS_DECLARE(void, row_normalize_f32, GRADOPS_ROW_NORMALIZE_ARGS)
namespace cpu { void row_normalize(GRADOPS_ROW_NORMALIZE_ARGS, void* = nullptr); }
namespace cuda { void row_normalize(GRADOPS_ROW_NORMALIZE_ARGS, void* stream); }
}  // namespace gradops
