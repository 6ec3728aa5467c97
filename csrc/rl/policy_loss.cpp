#include "rl/policy_loss.h"

#include "common/parallel.h"
#include "common/value_error.h"

#define GRADOPS_INLINE inline
#include "rl/policy_token.h"

namespace gradops {

int64_t cpu::policy_loss_workspace(const PolicyLossTask& t) { return 8 * kPolicySums * t.sequences; }

void cpu::policy_loss(const PolicyLossTask& t, void* workspace, void*) {
  if (t.offsets) check_offsets("cu_seqlens", t.offsets, t.sequences, t.tokens);
  double* sums = static_cast<double*>(workspace);
  const int64_t grain = t.tokens > 0 ? 1 + 4096 * t.sequences / t.tokens : 4096;  // about 4096 tokens
  parallel_for(0, t.sequences, grain,
               [&, kernel = GRADOPS_DISPATCH(policy_loss_sequences)](int64_t b, int64_t e) { kernel(t, b, e, sums); });
  double all[kPolicySums] = {};
  for (int64_t s = 0; s < t.sequences; ++s)
    for (int k = 0; k < kPolicySums; ++k) all[k] += sums[s * kPolicySums + k];
  finish_policy_loss(t.rule, double(t.tokens), all, t.totals);
}

}  // namespace gradops
