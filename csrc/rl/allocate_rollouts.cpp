#include "rl/allocate_rollouts.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <utility>
#include <vector>

namespace gradops {
namespace {

double utility(int64_t n, double p) { return n * (1 - p) * -std::expm1((n - 1) * std::log1p(-p)); }

std::vector<double> gains(double p, int64_t low, int64_t high) {  // over what `low` samples bring
  std::vector<double> g(size_t(high - low + 1), 0.);
  if (p > 0 && p < 1)  // at 0 and 1 all samples agree, and nothing is gained
    for (int64_t k = 1; k <= high - low; ++k) g[size_t(k)] = utility(low + k, p) - utility(low, p);
  return g;
}

// Table over prompts and samples handed out beyond `low`; then back along the choices.
void exact(const AllocateTask& t, int64_t spare) {
  const auto step = GRADOPS_DISPATCH(allocate_step);
  const size_t size = size_t(spare) + 1;
  std::vector<double> before(size, 0.), best(size);
  std::vector<int32_t> choice(size * size_t(t.prompts));
  for (int64_t i = 0; i < t.prompts; ++i) {
    const std::vector<double> g = gains(t.p[i], t.low, t.high);
    step(before.data(), best.data(), &choice[size_t(i) * size], g.data(), t.high - t.low, int64_t(size));
    before.swap(best);
  }
  size_t left = size - 1;
  for (int64_t i = t.prompts; i-- > 0;) {
    const int32_t k = choice[size_t(i) * size + left];
    t.counts[i] = t.low + k;
    left -= size_t(k);
  }
}

// One sample after another to the prompt where it gains most; the first of equals.
void greedy(const AllocateTask& t, int64_t spare) {
  using Offer = std::pair<double, int64_t>;  // gain, minus the prompt
  std::priority_queue<Offer> offers;
  const auto offer = [&](int64_t i) {
    const double p = t.p[i];
    if (t.counts[i] >= t.high || p <= 0 || p >= 1) return;
    offers.push({utility(t.counts[i] + 1, p) - utility(t.counts[i], p), -i});
  };
  for (int64_t i = 0; i < t.prompts; ++i) {
    t.counts[i] = t.low;
    offer(i);
  }
  for (; spare > 0 && !offers.empty(); --spare) {
    const int64_t i = -offers.top().second;
    offers.pop();
    ++t.counts[i];
    offer(i);
  }
}

}  // namespace

void cpu::allocate_rollouts(const AllocateTask& t) {
  const int64_t spare = std::min(t.budget - t.prompts * t.low, t.prompts * (t.high - t.low));
  t.exact ? exact(t, spare) : greedy(t, spare);
}

}  // namespace gradops
