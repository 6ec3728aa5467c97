// one_token_rollout: L = -sum_a w_a log p_a for each row of logits z, p = softmax(z). The weights w are constants:
// the exact form has w = beta q + (1 - beta) q_x e_x with q = softmax(z / temperature) and x the row's target, the
// sampled one w = sum over k draws a of q of (a == x ? 1 : beta) e_a / k. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct OneTokenRolloutTask {  // contiguous rows x cols logits
  const void* logits;
  Element element;
  int64_t rows, cols;
  const int64_t* targets;  // rows
  double temperature, beta;
  const int64_t* seeds;  // rows; null for the exact form
  int64_t* samples;      // rows x k, each row ascending; k is 0 for the exact form
  int64_t k;
  void* loss;     // rows; float, or double for double logits
  double* state;  // rows x 3: m = max z, log sum exp(z - m), log sum exp((z - m) / temperature)
};

struct OneTokenRolloutBackwardTask {
  const void* logits;
  Element element;
  int64_t rows, cols;
  const int64_t* targets;
  double temperature, beta;
  const int64_t* samples;
  int64_t k;
  const double* state;
  const void* grad;   // rows; of the type of the loss
  void* grad_logits;  // rows x cols; of the type of the logits: grad ((sum w) p - w)
};

// scratch: one double per kRolloutSegment columns, for the sampled form
constexpr int64_t kRolloutSegment = 64;
GRADOPS_DECLARE(void, one_token_rollout_rows, const OneTokenRolloutTask&, int64_t begin, int64_t end, double* scratch)
GRADOPS_DECLARE(void, one_token_rollout_backward_rows, const OneTokenRolloutBackwardTask&, int64_t begin, int64_t end)

namespace cpu {  // throw for a target or a sample outside [0, cols)
void one_token_rollout(const OneTokenRolloutTask&, void* = nullptr);
void one_token_rollout_backward(const OneTokenRolloutBackwardTask&, void* = nullptr);
}  // namespace cpu
namespace cuda {  // NaN in the rows of such a target; such a sample is ignored
void one_token_rollout(const OneTokenRolloutTask&, void* stream);
void one_token_rollout_backward(const OneTokenRolloutBackwardTask&, void* stream);
}  // namespace cuda
}  // namespace gradops
