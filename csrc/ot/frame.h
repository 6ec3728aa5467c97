// frame.h: what every solver of one transport problem begins and ends with. For any Team; local to the includer.
#pragma once
#include "ot/certificate.h"
#include "ot/evaluate.h"

namespace gradops {
namespace {

// Checks, the sizes that make the tests free of scale and shift, and empty lists. `converged` means: go on.
template <class Team>
GRADOPS_TEAM TransportStatus begin(Team& team, Transport& t, TransportState& s) {
  const int64_t n = t.cost.n, m = t.cost.m;
  s.evaluations = s.newton = s.products = 0, s.scanned = 0;
  double *least = s.rows[0], *most = s.rows[1];  // finite costs of a row, among the columns with mass
  double *total = s.rows[2], *finite = s.rows[3], *bad = s.rows[4];
  const double empty = team.sum(m, [&](int64_t j) { return t.b[j] > 0 ? 0. : 1.; });
  team.columns(n, m, [&](int64_t i, const auto& lanes) {
    const auto cost = [&](int64_t j) { return cost_at(t.cost, i, j); };
    double low, high, sum, number = double(m), wrong = 0;
    if (t.cost.matrix && t.cost.element == Element::f32) {  // mostly; a loop without cases
      const float* row = static_cast<const float*>(t.cost.matrix) + i * m;
      sum = lanes.span(m, [=](int64_t j) { return double(row[j]); }, low, high);
    } else {
      sum = lanes.span(m, cost, low, high);
    }
    if (empty > 0 || !(sum - sum == 0)) {
      const auto counts = [&](int64_t j) { return t.b[j] > 0 && cost(j) < kInfinity; };
      wrong = lanes.sum(m, [&](int64_t j) { return cost(j) > -kInfinity ? 0. : 1.; });  // NaN, -infinity
      low = -lanes.largest(m, [&](int64_t j) { return counts(j) ? -cost(j) : -kInfinity; });
      high = lanes.largest(m, [&](int64_t j) { return counts(j) ? cost(j) : -kInfinity; });
      sum = lanes.sum(m, [&](int64_t j) { return counts(j) ? cost(j) : 0.; });
      number = lanes.sum(m, [&](int64_t j) { return counts(j) ? 1. : 0.; });
    }
    lanes.once([&] { least[i] = low, most[i] = high, total[i] = sum, finite[i] = number, bad[i] = wrong; });
  });
  const double left = team.sum(n, [&](int64_t i) { return t.a[i]; });
  const double right = team.sum(m, [&](int64_t j) { return t.b[j]; });
  const double wrong = team.sum(n, [&](int64_t i) { return bad[i] + (t.a[i] >= 0 ? 0. : 1.); }) +
                       team.sum(m, [&](int64_t j) { return t.b[j] >= 0 ? 0. : 1.; });
  s.mass = left;
  const double *b = t.b, fair = right > 0 ? left / right : 1;  // both sums are the same from here on
  team.each(m, [&](int64_t j) { s.columns[3][j] = b[j] * fair; });
  t.b = s.columns[3];
  if (wrong > 0 || !(left < kInfinity) || !(__builtin_fabs(left - right) <= kMassTolerance * left))
    return TransportStatus::invalid;
  const double low = -team.largest(n, [&](int64_t i) { return t.a[i] > 0 ? -least[i] : -kInfinity; });
  const double high = team.largest(n, [&](int64_t i) { return t.a[i] > 0 ? most[i] : -kInfinity; });
  s.shift = low < kInfinity ? low : 0;
  s.spread = high > low ? high - low : 0;
  s.pieces = team.pieces(n, m);
  forget_lists(team, t, s);
  const double stranded = team.sum(n, [&](int64_t i) { return t.a[i] > 0 && finite[i] == 0 ? 1. : 0.; });
  return stranded > 0 ? TransportStatus::infeasible : TransportStatus::converged;
}

// The mean cost of every row. Needs begin's sums over the rows: call it right after.
template <class Team>
GRADOPS_TEAM void start_alpha(Team& team, const Transport& t, TransportState& s, double* alpha) {
  const double *total = s.rows[2], *finite = s.rows[3];
  team.each(t.cost.n, [&](int64_t i) { alpha[i] = t.a[i] > 0 ? total[i] / finite[i] - s.shift : kNever; });
}

// A column with mass that no row with mass can reach. Known after the first evaluation from a cold start.
template <class Team>
GRADOPS_TEAM bool unreachable(Team& team, const Transport& t, const Evaluation& e) {
  return team.sum(t.cost.m, [&](int64_t j) { return t.b[j] > 0 && e.count[j] == 0 ? 1. : 0.; }) > 0;
}

// The exact step of a row in no support: alpha_i with sum_j (alpha_i - c_ij - tau_j)_+ = reg a_i.
template <class Lanes>
GRADOPS_TEAM double row_update(const Lanes& lanes, const Transport& t, const TransportState& s, const Evaluation& e,
                               double reg, int64_t i) {
  const auto x = [&](int64_t j) { return t.b[j] > 0 ? s.shift - cost_at(t.cost, i, j) - e.tau[j] : -kInfinity; };
  int64_t number;
  const double guess = lanes.largest(t.cost.m, x) - reg * t.a[i];
  return -threshold(lanes, t.cost.m, x, reg * t.a[i], guess, number);
}

// Potentials of what has no mass, as large as leaves it empty, and the plan, the certificate and the report.
template <class Team>
GRADOPS_TEAM void finish(Team& team, const Transport& t, TransportState& s, const double* alpha, const Evaluation& e,
                         const Certificate& found, TransportStatus status) {
  const int64_t n = t.cost.n, m = t.cost.m;
  team.columns(n, m, [&](int64_t i, const auto& lanes) {
    const double least = t.a[i] > 0 ? 0. : -lanes.largest(m, [&](int64_t j) {
      return t.b[j] > 0 ? s.shift - cost_at(t.cost, i, j) - e.tau[j] : -kInfinity;
    });
    lanes.once([&] { t.alpha[i] = t.a[i] > 0 ? alpha[i] : least < kInfinity ? least : 0.; });
  });
  team.columns(m, n, [&](int64_t j, const auto& lanes) {
    const double top =
        t.b[j] > 0 ? e.tau[j]
                   : lanes.largest(n, [&](int64_t i) { return t.alpha[i] - (cost_at(t.cost, i, j) - s.shift); });
    lanes.once([&] { t.beta[j] = top > -kInfinity ? -top : 0.; });
  });
  const double mean = team.sum(n, [&](int64_t i) { return t.alpha[i]; }) / double(n);
  team.each(n, [&](int64_t i) { t.alpha[i] -= mean; });
  team.each(m, [&](int64_t j) { t.beta[j] += mean + s.shift; });
  team.columns(m, t.width, [&](int64_t j, const auto& lanes) {
    const int64_t from = j * t.capacity, to = j * t.width;
    lanes.each(t.width, [&](int64_t k) {
      const bool there = k < e.count[j];
      t.index[to + k] = there ? e.support[from + k] : 0;
      t.weight[to + k] = there ? e.weight[from + k] : 0.;
    });
  });
  const double widest = team.largest(m, [&](int64_t j) { return double(e.count[j]); });
  const double mass = s.mass > 0 ? s.mass : 1;
  team.once([&] {
    TransportReport& r = *t.report;
    r.value = found.primal + s.shift * s.mass;
    r.dual_value = e.value + s.shift * s.mass;
    r.gap = found.gap;
    r.marginal_err = e.residual / mass;
    r.ties = 0;
    r.n_iter = double(s.evaluations);
    r.status = double(status);
    r.newton = double(s.newton), r.cg = double(s.products), r.scans = s.scanned / double(m > 0 ? m : 1);
    r.widest = widest;
  });
}

// A problem that has no answer: potentials and values NaN, an empty plan.
template <class Team>
GRADOPS_TEAM void give_up(Team& team, const Transport& t, const TransportState& s, TransportStatus status) {
  const double nan = __builtin_nan("");
  team.each(t.cost.n, [&](int64_t i) { t.alpha[i] = nan; });
  team.each(t.cost.m, [&](int64_t j) { t.beta[j] = nan; });
  team.each(t.cost.m * t.width, [&](int64_t k) { t.index[k] = 0, t.weight[k] = 0; });
  team.once([&] { *t.report = {nan, nan, nan, nan, 0, double(s.evaluations), double(status), 0, 0, 0, 0}; });
}

}  // namespace
}  // namespace gradops
