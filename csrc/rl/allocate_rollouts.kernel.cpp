#include "rl/allocate_rollouts.h"

namespace gradops::GRADOPS_ISA {

// A tile of the table stays in registers and the first-level cache while all k pass over it.
void allocate_step(const double* before, double* best, int32_t* choice, const double* gain, int64_t extra,
                   int64_t size) {
  constexpr int64_t kRun = 512;
  for (int64_t begin = 0; begin < size; begin += kRun) {
    const int64_t end = begin + kRun < size ? begin + kRun : size;
    for (int64_t e = begin; e < end; ++e) {
      best[e] = before[e] + gain[0];
      choice[e] = 0;
    }
    for (int64_t k = 1; k <= extra && k < end; ++k) {
      const double g = gain[k];
#pragma omp simd
      for (int64_t e = begin > k ? begin : k; e < end; ++e) {
        const double candidate = before[e - k] + g;
        const bool better = candidate > best[e];
        best[e] = better ? candidate : best[e];
        choice[e] = better ? int32_t(k) : choice[e];
      }
    }
  }
}

}  // namespace gradops::GRADOPS_ISA
