#include "rl/permutation_weights.h"

#include <stdexcept>
#include <string>

#include "common/parallel.h"

namespace gradops {
namespace {

void check_offsets(const char* name, const int64_t* offsets, int64_t pieces, int64_t end, int64_t least) {
  bool good = offsets[0] == 0 && offsets[pieces] == end;
  for (int64_t i = 0; good && i < pieces; ++i) good = offsets[i + 1] - offsets[i] >= least && offsets[i + 1] <= end;
  if (!good)
    throw std::invalid_argument(std::string("permutation_weights: ") + name + " must rise from 0 to " +
                                std::to_string(end) + (least > 0 ? ", and no answer may be empty" : ""));
}

}  // namespace

void cpu::permutation_weights(const PermutationWeights& t, void*) {
  check_offsets("cu_seqlens", t.cu_seqlens, t.answers, t.tokens, 1);
  check_offsets("offsets", t.offsets, t.groups, t.answers, 0);
  const int64_t per_group = t.groups > 0 ? t.tokens / t.groups : 0;
  parallel_for(0, t.groups, 32768 / (per_group + 16) + 1,
               [&, kernel = GRADOPS_DISPATCH(permutation_weights_groups)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
