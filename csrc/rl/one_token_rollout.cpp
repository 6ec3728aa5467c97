#include "rl/one_token_rollout.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

int64_t grain(int64_t cols) { return 32768 / cols + 1; }

}  // namespace

void cpu::one_token_rollout(const OneTokenRolloutTask& t, void*) {
  check_ids("targets", t.targets, t.rows, t.cols);
  if (t.rows == 0) return;
  const int64_t bytes = t.k ? 8 * (t.cols / kRolloutSegment + 1) : 0;
  parallel_for(0, t.rows, grain(t.cols), [&, kernel = GRADOPS_DISPATCH(one_token_rollout_rows)](int64_t b, int64_t e) {
    kernel(t, b, e, bytes ? reinterpret_cast<double*>(thread_scratch(bytes)) : nullptr);
  });
}

void cpu::one_token_rollout_backward(const OneTokenRolloutBackwardTask& t, void*) {
  check_ids("targets", t.targets, t.rows, t.cols);
  check_ids("samples", t.samples, t.rows * t.k, t.cols);
  if (t.rows == 0) return;
  parallel_for(
      0, t.rows, grain(t.cols),
      [&, kernel = GRADOPS_DISPATCH(one_token_rollout_backward_rows)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
