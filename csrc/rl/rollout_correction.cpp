#include "rl/rollout_correction.h"

#include <stdexcept>

#include "common/parallel.h"

namespace gradops {

void cpu::rollout_correction(const RolloutTask& t, void*) {
  if (t.offsets) {
    bool good = t.offsets[0] == 0 && t.offsets[t.sequences] == t.tokens;
    for (int64_t s = 0; s < t.sequences; ++s) good = good && t.offsets[s] <= t.offsets[s + 1];
    if (!good) throw std::runtime_error("rollout_correction: cu_seqlens must rise from 0 to the number of tokens");
  }
  const int64_t grain = t.tokens > 0 ? 1 + 4096 * t.sequences / t.tokens : 4096;  // about 4096 tokens
  parallel_for(0, t.sequences, grain,
               [&, kernel = GRADOPS_DISPATCH(rollout_correction_sequences)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
