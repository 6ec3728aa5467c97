// rollout_correction: importance weights of the training policy over the policy that made the rollouts, truncated or
// rejected, by token or by sequence. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {

struct RolloutTask {
  const void *old_logp, *rollout_logp;  // float, or double if is_double
  const uint8_t* mask;                  // null: no token is masked
  const int64_t* offsets;               // sequences + 1; null: `length` tokens each
  void* weights;                        // as the inputs
  uint8_t* keep;
  bool is_double;
  int64_t sequences, tokens, length;
  int level;    // one ratio per token (0), or per sequence: the product (1) or the geometric mean (2) of its tokens'
  bool reject;  // outside of [low, high]: weight 0, not kept; else the ratio is moved to the nearest end
  double low, high, log_veto;  // a token with a log-ratio below log_veto rejects its sequence
};

GRADOPS_DECLARE(void, rollout_correction_sequences, const RolloutTask&, int64_t begin, int64_t end)

namespace cpu {
void rollout_correction(const RolloutTask&, void* = nullptr);
}
namespace cuda {
void rollout_correction(const RolloutTask&, void* stream);
}
}  // namespace gradops
