// gptq_spread_: w -= e u (or += with `add`), the products that second-order compensation is made of: what the columns
// before a block have left for it, and the updates of the factor. With `fresh`, w is taken as 0 and not read; what is
// in `base` is added at the end. Made for outputs a block wide and any depth. Every number is a sum in the order of
// `depth`, cut into pieces of one length, whatever the number of threads, rows or items: BLAS does not promise that. On
// the CPU only; on CUDA torch's product does it. Torch-free.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {

struct SpreadTask {
  void* w;                   // all of float, or all of double
  const void *e, *u, *base;  // base: or null
  int64_t w_batch, w_row, e_batch, e_row, u_batch, u_row, u_col, base_batch, base_row;  // distances in elements
  int64_t batch, rows, cols, depth;
  bool add, fresh;
};

struct SpreadEngine {
  int64_t tile_rows;                            // rows of w handled together
  int64_t (*scratch_bytes)(const SpreadTask&);  // of the calling thread
  // Tiles [begin, end) of batch * ceil(rows / tile_rows)
  void (*run)(const SpreadTask&, int64_t begin, int64_t end, char* scratch);
};
GRADOPS_DECLARE(const SpreadEngine&, gptq_spread_engine, bool wide)  // of double

namespace cpu {
void gptq_spread(const SpreadTask&, bool wide);
}
}  // namespace gradops
