#include "rl/capo_curvature.h"

#include "common/parallel.h"
#include "common/scratch.h"
#include "common/value_error.h"

namespace gradops {
namespace {

// tokens per piece of work of at least 64 Ki numbers
int64_t grain(int64_t numbers_per_token) { return 65536 / (numbers_per_token > 0 ? numbers_per_token : 1) + 1; }

}  // namespace

void cpu::capo_curvature(const CapoTokens& t, const CapoAdam& adam, const CapoResults& out, void*) {
  const auto kernel = GRADOPS_DISPATCH(capo_curvature_tokens);
  check_ids("action_index", t.action, t.tokens, t.k, INT64_MIN);
  if (adam.rows) check_ids("token_ids", adam.rows, t.tokens * t.k, adam.count);
  parallel_for(0, t.tokens, grain(adam.rows ? t.k * t.h : t.h), [&](int64_t b, int64_t e) {
    kernel(t, adam, out, b, e, thread_scratch(t.h * int64_t(sizeof(double)) + 1));
  });
}

void cpu::capo_curvature_sgd(const CapoTokens& t, const CapoMoments& moments, const CapoResults& out, void*) {
  const auto kernel = GRADOPS_DISPATCH(capo_curvature_closed);
  parallel_for(0, t.tokens, grain(t.h), [&](int64_t b, int64_t e) { kernel(t, moments, out, b, e); });
}

}  // namespace gradops
