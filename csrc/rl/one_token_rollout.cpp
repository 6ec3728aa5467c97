#include "rl/one_token_rollout.h"

#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {
namespace {

void check_ids(const int64_t* ids, int64_t n, int64_t cols, const char* name) {
  for (int64_t i = 0; i < n; ++i)
    if (ids[i] < 0 || ids[i] >= cols)
      throw std::runtime_error(std::string("one_token_rollout: ") + name + " must lie in [0, " + std::to_string(cols) +
                               "), got " + std::to_string(ids[i]));
}

int64_t grain(int64_t cols) { return 32768 / cols + 1; }

}  // namespace

void cpu::one_token_rollout(const OneTokenRolloutTask& t, void*) {
  check_ids(t.targets, t.rows, t.cols, "targets");
  if (t.rows == 0) return;
  const int64_t bytes = t.k ? 8 * (t.cols / kRolloutSegment + 1) : 0;
  parallel_for(0, t.rows, grain(t.cols), [&, kernel = GRADOPS_DISPATCH(one_token_rollout_rows)](int64_t b, int64_t e) {
    kernel(t, b, e, bytes ? reinterpret_cast<double*>(thread_scratch(bytes)) : nullptr);
  });
}

void cpu::one_token_rollout_backward(const OneTokenRolloutBackwardTask& t, void*) {
  check_ids(t.targets, t.rows, t.cols, "targets");
  check_ids(t.samples, t.rows * t.k, t.cols, "samples");
  if (t.rows == 0) return;
  parallel_for(
      0, t.rows, grain(t.cols),
      [&, kernel = GRADOPS_DISPATCH(one_token_rollout_backward_rows)](int64_t b, int64_t e) { kernel(t, b, e); });
}

}  // namespace gradops
