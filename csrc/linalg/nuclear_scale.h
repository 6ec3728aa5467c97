// nuclear_scale: <M, U> = sum of M[i, j] * U[i, j], one number per matrix, summed in double in a fixed order.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct NuclearScaleTask {
  const void *m, *u;  // batch x size, contiguous
  double* out;        // batch
  Element element;
  int64_t batch, size;
};
// The sum over entries [begin, end) of one item.
GRADOPS_DECLARE(double, nuclear_scale_dot, const void* m, const void* u, Element element, int64_t begin, int64_t end)

namespace cpu {
void nuclear_scale(const NuclearScaleTask&, void* workspace, void* = nullptr);
int64_t nuclear_scale_workspace(const NuclearScaleTask&);  // bytes
}  // namespace cpu
namespace cuda {
void nuclear_scale(const NuclearScaleTask&, void* workspace, void* stream);
int64_t nuclear_scale_workspace(const NuclearScaleTask&);
}  // namespace cuda
}  // namespace gradops
