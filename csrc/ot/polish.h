// polish.h: Newton's last step, taken by the plan itself. An entry is the difference of potentials divided by reg, so
// that their rounding leaves a plan short of its marginals; the change of an entry is not rounded that way.
// For any Team; local to the includer.
#pragma once
#include "ot/components.h"

namespace gradops {
namespace {

// From s.now, at alpha, into s.trial, at `next`: the plan that Newton's step on the support makes, less the entries
// that it makes negative. False if the step is so long that potentials and plan would differ by more than 5e-6 of the
// largest b, beyond rounding; or if |grad|_1 does not fall by half, as where components of the plan lack more: no step
// on their support helps those. The value stays: so near the maximum D does not rise any more.
template <class Team>
GRADOPS_TEAM bool polish(Team& team, const Transport& t, TransportState& s, double reg, double rtol, int64_t most,
                         const double* alpha, double* next, double* rhs, const CgVectors& w, double* step) {
  const int64_t n = t.cost.n;
  const Evaluation &e = s.now, &to = s.trial;
  team.once([&] { find_components(t, s, e, w.rest); });
  const double lost = team.sum(n, [&](int64_t i) { return __builtin_fabs(w.rest[i]); });
  if (!(lost <= .5 * e.residual)) return false;
  const double lam = 1e-12 * (1 + team.sum(n, [&](int64_t i) { return e.degree[i]; }) / double(n));
  team.each(n, [&](int64_t i) { rhs[i] = e.degree[i] > 0 ? reg * e.grad[i] : 0.; });
  s.products += conjugate_gradients(
      team, n, [&](const double* x, double* y) { laplacian_apply(team, t, s, e, lam, x, y); }, e.degree, lam, rhs, rtol,
      most, w, step);
  const double longest = team.largest(n, [&](int64_t i) { return __builtin_fabs(step[i]); });
  const double least = 0x1p-50 * s.spread;  // potentials have that much of an error anyhow
  if (!(longest <= least + 2.5e-6 * reg * team.largest(t.cost.m, [&](int64_t j) { return t.b[j]; }))) return false;
  visit_pieces(team, t, s, e.work, 2 * n, [&](int64_t j, const auto& lanes, double* sums) {
    const int64_t at = j * t.capacity, count = e.count[j];
    const int32_t* from = e.support + at;
    int32_t* row = to.support + at;
    const double* before = e.weight + at;
    double* weight = to.weight + at;
    const double mean = count > 0 ? lanes.sum_at(count, step, from) / double(count) : 0;
    lanes.each(count, [&](int64_t k) { weight[k] = before[k] + (step[from[k]] - mean) / reg; });
    lanes.wait();
    const Kept kept = keep_above(lanes, count, from, weight, 0., row);
    const double scale = t.b[j] / kept.sum;
    lanes.each(kept.count, [&](int64_t k) { weight[k] *= scale; });
    lanes.once([&] { to.count[j] = int32_t(kept.count), to.tau[j] = e.tau[j] + mean; });
    lanes.count_at(kept.count, row, weight, sums);
    lanes.wait();
  });
  sum_rows(team, t, s, s.trial);
  s.trial.value = e.value, s.trial.work = e.work;
  if (!(s.trial.residual <= .5 * e.residual)) return false;
  team.each(n, [&](int64_t i) { next[i] = t.a[i] > 0 ? alpha[i] + step[i] : kNever; });
  return true;
}

}  // namespace
}  // namespace gradops
