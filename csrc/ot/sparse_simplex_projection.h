// sparse_simplex_projection: of every vector x, the nearest t >= 0 with sum(t) = z and at most max_nz positive entries:
// t = (x - tau)_+ on the max_nz largest x. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct SparseSimplexTask {
  const void* x;  // (vectors, size)
  Element element;
  int64_t vectors, size;
  const double* z;  // vectors
  int64_t width;    // entries that may be positive, and that are stored; at most size
  void* values;     // (vectors, width)
  int64_t* index;   // (vectors, width), ascending: the positive entries, and the first ones of the rest
  void* tau;        // vectors
};
// scratch: size numbers and size rows
GRADOPS_DECLARE(void, sparse_simplex_rows, const SparseSimplexTask&, int64_t begin, int64_t end, double* scratch,
                int32_t* rows)

namespace cpu {
void sparse_simplex_projection(const SparseSimplexTask&, void* = nullptr);
}
namespace cuda {
void sparse_simplex_projection(const SparseSimplexTask&, void* stream);
}
}  // namespace gradops
