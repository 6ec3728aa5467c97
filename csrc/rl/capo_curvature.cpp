#include "rl/capo_curvature.h"

#include <stdexcept>
#include <string>

#include "common/parallel.h"
#include "common/scratch.h"

namespace gradops {
namespace {

void check(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value < high) return;
  throw std::invalid_argument(std::string("capo_curvature: ") + what + " must be below " + std::to_string(high) +
                              (low == 0 ? " and not negative" : "") + ", got " + std::to_string(value));
}

// tokens per piece of work of at least 64 Ki numbers
int64_t grain(int64_t numbers_per_token) { return 65536 / (numbers_per_token > 0 ? numbers_per_token : 1) + 1; }

}  // namespace

void cpu::capo_curvature(const CapoTokens& t, const CapoAdam& adam, const CapoResults& out, void*) {
  const auto kernel = GRADOPS_DISPATCH(capo_curvature_tokens);
  for (int64_t n = 0; n < t.tokens; ++n) check("action_index", t.action[n], INT64_MIN, t.k);
  if (adam.rows)
    for (int64_t i = 0; i < t.tokens * t.k; ++i) check("token_ids", adam.rows[i], 0, adam.count);
  parallel_for(0, t.tokens, grain(adam.rows ? t.k * t.h : t.h), [&](int64_t b, int64_t e) {
    kernel(t, adam, out, b, e, thread_scratch(t.h * int64_t(sizeof(double)) + 1));
  });
}

void cpu::capo_curvature_sgd(const CapoTokens& t, const CapoMoments& moments, const CapoResults& out, void*) {
  const auto kernel = GRADOPS_DISPATCH(capo_curvature_closed);
  parallel_for(0, t.tokens, grain(t.h), [&](int64_t b, int64_t e) { kernel(t, moments, out, b, e); });
}

}  // namespace gradops
