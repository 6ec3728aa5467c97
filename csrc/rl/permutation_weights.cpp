#include "rl/permutation_weights.h"

#include "common/parallel.h"
#include "common/value_error.h"

namespace gradops {
void cpu::permutation_weights(const PermutationWeights& t, void*) {
  check_offsets("cu_seqlens", t.cu_seqlens, t.answers, t.tokens, 1);
  check_offsets("offsets", t.offsets, t.groups, t.answers);
  const int64_t per_group = t.groups > 0 ? t.tokens / t.groups : 0;
  parallel_for(0, t.groups, 32768 / (per_group + 16) + 1,
               [&, kernel = GRADOPS_DISPATCH(permutation_weights_groups)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
