// gptq_spread_: w -= e u (or += with `add`), for what the columns of one block have left for those to the right of it:
// e is narrow, w and u are wide. Every number is one sum in the order of the block's columns, whatever the number of
// threads, rows or items: BLAS does not promise that. On the CPU only; on CUDA torch's product does it. Torch-free.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {

struct SpreadTask {
  float* w;
  const float *e, *u;
  int64_t w_batch, w_row, e_batch, e_row, u_batch, u_row, u_col;  // distances in elements
  int64_t batch, rows, cols, depth;
  bool add;
};

GRADOPS_DECLARE(int64_t, gptq_spread_panels, int64_t cols)    // per item
GRADOPS_DECLARE(int64_t, gptq_spread_scratch, int64_t depth)  // bytes
// Panels [begin, end) of batch * panels
GRADOPS_DECLARE(void, gptq_spread_range, const SpreadTask&, int64_t begin, int64_t end, char* scratch)

namespace cpu {
void gptq_spread(const SpreadTask&);
}
}  // namespace gradops
