// The steps of recursive gradient estimates, for a list of tensors in one call each. Torch-free interface.
//   harpg_update: d <- (1 - eta) (d + sign change) + eta sign grad, and the sum of squares of all new d
//   harpg_apply:  param <- param - c d, with c = lr, or lr / norm (0 if that is not positive)
// The tensors are cut into chunks, by their sizes alone; each chunk's squares are summed in double, and the chunks'
// sums added in order. So no bit depends on the number of threads.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

constexpr int64_t kHarpgChunk = 16384;  // numbers
GRADOPS_BOTH constexpr int64_t harpg_chunks(int64_t size) { return (size + kHarpgChunk - 1) / kHarpgChunk; }

struct HarpgUpdate {  // numbers of one tensor lie alike in all three
  void* d;
  const void *change, *grad;  // change: null for none
  Element d_element, change_element, grad_element;
  int64_t size;
  double eta, sign;  // with eta = 1 neither d nor change is read
};
struct HarpgApply {
  void* param;
  const void* d;
  void* scale;  // c, rounded to the type of d, is left here, and this is what is used
  Element param_element, d_element;
  int64_t size;
};
struct HarpgStep {
  double lr;
  const void* lr_tensor;  // a factor of lr; null for none
  Element lr_element;
  const double* norm;  // null for no division
};

// Numbers [begin, end); the sum of squares of the new d
GRADOPS_DECLARE(double, harpg_update, const HarpgUpdate&, int64_t begin, int64_t end)
GRADOPS_DECLARE(double, harpg_scale, const HarpgApply&, const HarpgStep&)  // writes and returns c
GRADOPS_DECLARE(void, harpg_apply, const HarpgApply&, double c, int64_t begin, int64_t end)

namespace cpu {
// norm: the root of the sum; workspace: one double for each chunk
void harpg_update(const HarpgUpdate*, int64_t count, double* workspace, double* norm, void* = nullptr);
void harpg_apply(const HarpgApply*, int64_t count, const HarpgStep&, void* = nullptr);
}  // namespace cpu
namespace cuda {
void harpg_update(const HarpgUpdate*, int64_t count, double* workspace, double* norm, void* stream);
void harpg_apply(const HarpgApply*, int64_t count, const HarpgStep&, void* stream);
}  // namespace cuda
}  // namespace gradops
