#include "rl/rollout_correction.h"

#include "common/parallel.h"
#include "common/value_error.h"

namespace gradops {

void cpu::rollout_correction(const RolloutTask& t, void*) {
  if (t.offsets) check_offsets("cu_seqlens", t.offsets, t.sequences, t.tokens);
  const int64_t grain = t.tokens > 0 ? 1 + 4096 * t.sequences / t.tokens : 4096;  // about 4096 tokens
  parallel_for(0, t.sequences, grain,
               [&, kernel = GRADOPS_DISPATCH(rollout_correction_sequences)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
