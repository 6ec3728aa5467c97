// upper_factor: R upper triangular with R R^T = h, for blocks small enough for the first-level cache, and R^-1: the
// Cholesky factorisation from the last column to the first. LAPACK is several times slower at this size, and the
// blocked factorisation (quant/hessian_factor.py) waits for it. Torch-free, and on the CPU only: on CUDA cuSOLVER
// factors the whole matrix.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {

constexpr int64_t kMostUpperColumns = 128;

struct UpperTask {
  const void* h;           // batch x n x n of float or double; what is below the diagonal is not read
  int64_t h_batch, h_row;  // distances in elements
  int64_t batch, n;
  bool factored;           // h is R already
  void *factor, *inverse;  // batch x n x n, zero below the diagonal
  bool* failed;            // batch: no such R; factor and inverse are then finite or not
};

GRADOPS_DECLARE(void, upper_factor_items, const UpperTask&, bool wide, int64_t begin, int64_t end)

namespace cpu {
void upper_factor(const UpperTask&, bool wide);  // wide: of double
}
}  // namespace gradops
