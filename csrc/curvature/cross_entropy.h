// cross_entropy: the cross entropy of rows of logits, with derivatives of two orders. Torch-free interface.
//
// For a row z with p = softmax(z), and t = (1 - s) e_target + s / cols with the label smoothing s:
//   loss = lse - t.z          its change along z_dot: lse_dot - t.z_dot, with lse_dot = p.z_dot
//   dz   = g (p - t)          its change: g_dot (p - t) + g p (z_dot - lse_dot)
// The last for g_dot = 0 is the product of the loss's Hessian with z_dot. A row whose target is ignore_index has loss 0
// and no gradient, and is not read.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct CrossEntropyRows {  // rows x cols numbers, contiguous
  const void *z, *z_dot;   // z_dot null: there is none
  Element element;
  int64_t rows, cols;
  const int64_t* target;
  int64_t ignore_index;
  double label_smoothing;
};

struct CrossEntropySums : CrossEntropyRows {
  const double* known_lse;  // null: not known yet
  double *loss, *lse;       // with z_dot, their changes
};

struct CrossEntropyGrad : CrossEntropyRows {  // with z_dot, the gradient's change
  const double *lse, *lse_dot, *g;            // lse_dot, g: for z_dot alone
  const double* slope;                        // of p - t: g, or with z_dot, g_dot; null: 0
  void* out;                                  // may be z or z_dot
};

struct SoftmaxCeHvp {
  const void *z, *u;
  Element element;
  int64_t rows, cols;
  const double* scale;  // of each row; where it is 0 the row is not read
  void* out;            // may be z or u
};

// Rows [begin, end)
GRADOPS_DECLARE(void, cross_entropy_sums, const CrossEntropySums&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, cross_entropy_grad, const CrossEntropyGrad&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, softmax_ce_hvp, const SoftmaxCeHvp&, int64_t begin, int64_t end)

namespace cpu {  // throw for a target outside [0, cols)
void cross_entropy(const CrossEntropySums&, void* = nullptr);
void cross_entropy_backward(const CrossEntropyGrad&, void* = nullptr);
void softmax_ce_hvp(const SoftmaxCeHvp&, void* = nullptr);
}  // namespace cpu
namespace cuda {  // such a row is NaN
void cross_entropy(const CrossEntropySums&, void* stream);
void cross_entropy_backward(const CrossEntropyGrad&, void* stream);
void softmax_ce_hvp(const SoftmaxCeHvp&, void* stream);
}  // namespace cuda
}  // namespace gradops
