// allocate_rollouts: how many samples each prompt gets, for the largest total utility
// U(B, p) = B (1 - p) (1 - (1 - p)^(B - 1)). A plan made on the host. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/isa.h"

namespace gradops {

// best[e] = max over 0 <= k <= min(e, extra) of before[e - k] + gain[k]; choice[e] = the smallest such k.
GRADOPS_DECLARE(void, allocate_step, const double* before, double* best, int32_t* choice, const double* gain,
                int64_t extra, int64_t size)

struct AllocateTask {
  const double* p;  // in [0, 1]
  int64_t* counts;
  int64_t prompts, budget, low, high;
  bool exact;
};
namespace cpu {
void allocate_rollouts(const AllocateTask&);
}
}  // namespace gradops
