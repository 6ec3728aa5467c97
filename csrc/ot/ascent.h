// ascent.h: transport with at most max_nz entries per column: maximisation of the semi-dual, which is concave but has
// kinks where the max_nz-th and the next value of a column agree. For any Team; local to the includer.
//
//   1. The quadratic problem, roughly. If no support is larger than max_nz, its solution is the answer.
//   2. Otherwise the smoothed dual (ot/smooth_column.h), by damped semismooth Newton. Smoothing costs mu/2 |t - z|^2,
//      where z is the last stage's plan: the proximal point method (Rockafellar 1976), whose plans tend to the
//      relaxation's at any mu. mu falls from reg: fast while stages are rough, then only where a stage gained too
//      little. The plan meets the rows, but has some columns with more than max_nz entries (plan "averaged"): it is the
//      solution of the convex relaxation, whose value bounds the dual from above.
//   3. The alpha with the largest true dual value seen at a stage's end is kept, with its plan of max_nz largest
//      ("sparse"). Where that plan meets the rows there is no gap: converged. max_nz = 1 on an assignment problem ends
//      so: its relaxation is the assignment linear program, solved exactly from some mu > 0 on. Elsewhere the averaged
//      plan says which of a column's tied entries the sparse one takes.
#pragma once
#include "ot/path_newton.h"
#include "ot/smooth_column.h"
#include "ot/solve_state.h"

namespace gradops {
namespace {

// What the smoothing adds to the candidates' alpha_i - c_ij, left in x: mu times their entry in the center. Returns how
// much at most it would add to one that is no candidate.
template <class Lanes>
GRADOPS_TEAM double pull_to_center(const Lanes& lanes, const Transport& t, const Candidates& c,
                                   const SparseColumns& center, double mu, double* x, int64_t j) {
  const int64_t at = j * t.capacity;
  return lanes.sum(center.count[j], [&](int64_t p) {
    const int64_t k = place_of(c.index + at, c.count[j], center.support[at + p]);
    const double pull = mu * center.weight[at + p];
    if (k < 0) return pull;
    x[k] += pull;
    return 0.;
  });
}

// Levels of column j. Leaves the candidates' alpha_i - c_ij, pulled to the center, in the column's weights, for
// smooth_fill.
template <class Lanes>
GRADOPS_TEAM void smooth_project(const Lanes& lanes, const Transport& t, const TransportState& s, const AscentState& a,
                                 const double* alpha, const Smoothing& w, const SmoothEvaluation& e, int64_t j) {
  const Candidates& c = s.lists;
  const int64_t at = j * t.capacity, count = c.count[j];
  const int32_t* index = c.index + at;
  const double* cost = c.cost + at;
  double* x = e.e.weight + at;
  lanes.each(count, [=](int64_t k) { x[k] = alpha[index[k]] - cost[k]; });
  lanes.wait();
  const double bound = c.low[j] + c.rise[c.epoch[j] % kEpochs] + pull_to_center(lanes, t, c, a.center, w.mu, x, j);
  lanes.wait();
  ColumnLevels l{0, 0};
  if (t.b[j] > 0) l = column_levels(lanes, count, Values{x}, w, t.b[j], {a.tau[j], a.theta[j]});
  const double level = l.tau + l.theta;
  int64_t number;
  lanes.above(count, Values{x}, level, number);
  lanes.once([&] {
    e.e.tau[j] = a.tau[j] = l.tau, e.theta[j] = a.theta[j] = l.theta;
    e.level[j] = c.guess[j] = level;
    c.mark[j] = !(t.b[j] > 0) ? kListGood : bound > level ? kListStale : list_length(count, number);
  });
}

template <class Lanes>
GRADOPS_TEAM void smooth_fill(const Lanes& lanes, const Transport& t, const TransportState& s, const Smoothing& w,
                              const SmoothEvaluation& e, int64_t j) {
  const Candidates& c = s.lists;
  const int64_t at = j * t.capacity, count = c.count[j];
  const int32_t* index = c.index + at;
  double* weight = e.e.weight + at;
  int32_t* row = e.e.support + at;
  if (!(t.b[j] > 0)) {
    lanes.once([&] { e.e.count[j] = 0, s.columns[1][j] = 0; });
    return;
  }
  const double tau = e.e.tau[j], theta = e.theta[j];
  const double top = lanes.largest(count, Values{weight});
  int64_t kept = 0;
  if (top > tau + theta) {
    kept = keep_above(lanes, count, index, weight, tau + theta, row).count;
    lanes.wait();
    lanes.each(kept, [=](int64_t k) { weight[k] = w.entry(weight[k], theta); });
  } else if (count > 0) {  // lost in rounding: the largest takes it all
    kept = lanes.keep(
        count, [=](int64_t k) { return Entry{index[k], weight[k]}; }, [=](Entry v) { return v.x == top; },
        [=](Entry v, int64_t place) { row[place] = v.row, weight[place] = 1; });
  }
  lanes.wait();
  const double scale = t.b[j] / lanes.sum(kept, [&](int64_t k) { return weight[k]; });
  lanes.each(kept, [&](int64_t k) { weight[k] *= scale; });
  const double full = lanes.sum(kept, [&](int64_t k) { return w.full(weight[k], theta) ? 1. : 0.; });
  const double product = lanes.sum(kept, [&](int64_t k) { return weight[k] * w.height(weight[k], theta); });
  lanes.once([&] { e.e.count[j] = int32_t(kept), e.full[j] = full, s.columns[1][j] = tau * t.b[j] + .5 * product; });
}

// As evaluate(), of the smoothed dual.
template <class Team>
GRADOPS_TEAM bool smooth_evaluate(Team& team, const Transport& t, TransportState& s, const AscentState& a,
                                  const double* alpha, const Smoothing& w, SmoothEvaluation& e) {
  const Candidates& c = s.lists;
  const int64_t n = t.cost.n, m = t.cost.m;
  s.evaluations += 1;
  measure_rise(team, t, s, alpha);
  const int64_t work = 8 * s.list_work;
  team.columns(m, work, [&](int64_t j, const auto& lanes) { smooth_project(lanes, t, s, a, alpha, w, e, j); });
  const double stale = team.sum(m, [&](int64_t j) { return c.mark[j] == kListStale ? 1. : 0.; });
  const double longs = team.sum(m, [&](int64_t j) { return c.mark[j] == kListLong ? 1. : 0.; });
  if (stale > 0 || longs * 8 > double(m)) {
    if (!refresh(team, t, s, alpha, w.reg, w.mu)) return false;
    team.columns(m, work, [&](int64_t j, const auto& lanes) {  // lists have changed
      if (c.mark[j] != kListGood) smooth_project(lanes, t, s, a, alpha, w, e, j);
    });
  }
  scatter(
      team, t, s, 4 * s.list_work,
      [&](int64_t j, const auto& lanes, double* sum) {
        smooth_fill(lanes, t, s, w, e, j);
        lanes.wait();
        const double* weight = e.e.weight + j * t.capacity;
        const int32_t* row = e.e.support + j * t.capacity;
        lanes.add_at(e.e.count[j], row, [&](int64_t k) { return weight[k]; }, sum);
        lanes.wait();
      },
      [&](int64_t i, double sum) { return t.a[i] - sum; }, e.e.grad);
  const double linear = team.sum(n, [&](int64_t i) { return t.a[i] > 0 ? alpha[i] * t.a[i] : 0.; });
  e.e.value = linear - team.sum(m, [&](int64_t j) { return s.columns[1][j]; });
  e.e.residual = team.sum(n, [&](int64_t i) { return __builtin_fabs(e.e.grad[i]); });
  return true;
}

// reg times minus the Hessian: per column diag(d) - [p q] K^-1 [p q]', where p marks all entries with their slopes, q
// those that share, and K is of LevelSlopes.
template <class Team>
GRADOPS_TEAM void smooth_degree(Team& team, const Transport& t, const TransportState& s, const Smoothing& w,
                                const SmoothEvaluation& e, double* degree) {
  scatter(
      team, t, s, 4 * s.list_work,
      [&](int64_t j, const auto& lanes, double* sum) {
        const double *weight = e.e.weight + j * t.capacity, theta = e.theta[j];
        const int32_t* row = e.e.support + j * t.capacity;
        lanes.add_at(e.e.count[j], row, [&](int64_t k) { return w.slope(weight[k], theta); }, sum);
        lanes.wait();
      },
      [](int64_t, double sum) { return sum; }, degree);
}

template <class Team>
GRADOPS_TEAM void smooth_apply(Team& team, const Transport& t, const TransportState& s, const Smoothing& w,
                               const SmoothEvaluation& e, const double* degree, double lam, const double* v,
                               double* out) {
  scatter(
      team, t, s, 4 * s.list_work,
      [&](int64_t j, const auto& lanes, double* sum) {
        const double *weight = e.e.weight + j * t.capacity, theta = e.theta[j];
        const int32_t* row = e.e.support + j * t.capacity;
        const int64_t count = e.e.count[j];
        if (count == 0) return;
        const double all = lanes.sum_at(count, v, row);
        const double shared = lanes.sum(count, [&](int64_t k) { return w.full(weight[k], theta) ? 0. : v[row[k]]; });
        const double both = w.whole * (all - shared) + w.part * shared;
        double tau, level;  // how the levels move along v
        LevelSlopes(w, count, int64_t(e.full[j])).solve(both, w.part * shared, tau, level);
        const double full = w.whole * tau, part = w.part * (tau + level);
        lanes.add_at(count, row, [&](int64_t k) { return w.full(weight[k], theta) ? full : part; }, sum);
        lanes.wait();
      },
      [&](int64_t i, double sum) { return (degree[i] + lam) * v[i] - sum; }, out);
}

// Raises the smoothed dual from v.alpha, whose evaluation is a.now, until |grad|_1 <= goal: conjugate gradients for the
// step, then a search along it by false position on the slope. No value is compared that rounding could decide.
template <class Team>
GRADOPS_TEAM NewtonEnd smooth_ascend(Team& team, const Transport& t, TransportState& s, AscentState& a,
                                     const Smoothing& w, double goal, int64_t limit) {
  const int64_t n = t.cost.n;
  const NewtonVectors v = newton_vectors(s);
  double damping = 0.1;
  while (a.now.e.residual > goal) {
    const SmoothEvaluation& e = a.now;
    smooth_degree(team, t, s, w, e, v.degree);
    const double relative = e.e.residual / s.mass,
                 mean = team.sum(n, [&](int64_t i) { return v.degree[i]; }) / double(n);
    // A row in no support takes its exact step alone, as in ascend().
    team.each(n, [&](int64_t i) { v.rhs[i] = v.degree[i] > 0 ? w.reg * e.e.grad[i] : 0.; });
    const double lone = team.sum(n, [&](int64_t i) { return v.degree[i] == 0 && t.a[i] > 0 ? 1. : 0.; });
    bool ascends = false;
    while (!ascends) {
      const double lam = damping * (relative < 1 ? relative : 1) * (mean > 1 ? mean : 1);
      const double rtol = relative < 0.01 ? __builtin_sqrt(relative) : 0.1;
      s.products += conjugate_gradients(
          team, n, [&](const double* x, double* y) { smooth_apply(team, t, s, w, e, v.degree, lam, x, y); }, v.degree,
          lam, v.rhs, rtol, 300, v.cg, v.step);
      s.newton += 1;
      if (lone > 0) {
        Evaluation levels = e.e;
        levels.tau = e.level;  // it would share in every column
        team.columns(n, 1 + int64_t(lone * double(t.cost.m) / double(n)), [&](int64_t i, const auto& lanes) {
          if (v.degree[i] > 0 || !(t.a[i] > 0)) return;
          const double alpha = row_update(lanes, t, s, levels, w.mu, i);
          lanes.once([&] { v.step[i] = alpha - v.alpha[i]; });
        });
      }
      const double gain = team.sum(n, [&](int64_t i) { return e.e.grad[i] * v.step[i]; });
      double length = 1;
      int tries = 0;
      for (; tries < 8 && !ascends; ++tries) {
        if (s.evaluations >= limit) return NewtonEnd::limit;
        team.each(n, [&](int64_t i) { v.next[i] = t.a[i] > 0 ? v.alpha[i] + length * v.step[i] : kNever; });
        if (!smooth_evaluate(team, t, s, a, v.next, w, a.trial)) return NewtonEnd::overflow;
        const double change = team.sum(n, [&](int64_t i) { return a.trial.e.grad[i] * v.step[i]; });
        const double rise = a.trial.e.value - e.e.value, size = __builtin_fabs(e.e.value);
        ascends = change >= 0 || rise >= 1e-4 * length * gain + 1e-15 * size ||
                  (__builtin_fabs(change) <= .5 * gain && __builtin_fabs(rise) <= 1e-14 * size);
        const double cut = gain / (gain - change);
        if (!ascends) length *= cut < .1 ? .1 : cut > .7 ? .7 : cut;
      }
      if (ascends && tries == 1)
        damping = damping / 4 > 1e-4 ? damping / 4 : 1e-4;
      else if (ascends && tries > 2)
        damping *= 2;
      else if (!ascends)
        damping *= 16;
      if (damping > 1e12) return NewtonEnd::stalled;
    }
    team.each(n, [&](int64_t i) { v.alpha[i] = v.next[i]; });
    const SmoothEvaluation accepted = a.trial;
    a.trial = a.now;
    a.now = accepted;
  }
  return NewtonEnd::reached;
}

// An upper bound of the dual: the relaxation's value at the smoothed plan, moved onto the rows as
// by Altschuler et al. 2017 (shrink what is too much, put the rest elsewhere). Norms are convex and no k-support norm
// exceeds the sum of its entries, so that the bound needs only the mass that moves, not where to. `far`: no less than
// any cost.
template <class Team>
GRADOPS_TEAM double relaxed_value(Team& team, const Transport& t, const TransportState& s, const AscentState& a,
                                  const double* alpha, const Smoothing& w, double far) {
  const SmoothEvaluation& e = a.now;
  const SparseColumns& z = a.center;
  const int64_t n = t.cost.n, m = t.cost.m;
  const double linear = team.sum(n, [&](int64_t i) { return t.a[i] > 0 ? alpha[i] * (t.a[i] - e.e.grad[i]) : 0.; });
  double* value = s.columns[0];
  team.columns(m, s.list_work, [&](int64_t j, const auto& lanes) {
    const double *weight = e.e.weight + j * t.capacity, theta = e.theta[j];
    const int32_t* row = e.e.support + j * t.capacity;
    const int64_t count = e.e.count[j];
    const double product = lanes.sum(count, [&](int64_t k) { return weight[k] * w.height(weight[k], theta); });
    const double half = .5 * lanes.sum(count, [&](int64_t k) {
      return weight[k] * (w.full(weight[k], theta) ? w.reg * weight[k] : theta);
    });
    const double moved = lanes.sum(count, [&](int64_t k) {
      const double grad = e.e.grad[row[k]];
      return grad < 0 ? weight[k] * -grad / (t.a[row[k]] - grad) : 0.;
    });
    const double pulled = lanes.sum(z.count[j], [&](int64_t p) {
      const int64_t k = place_of(row, count, z.support[j * t.capacity + p]);
      return k < 0 ? 0. : w.mu * z.weight[j * t.capacity + p] * weight[k];
    });
    const double norm = __builtin_sqrt(half) + __builtin_sqrt(.5 * w.reg) * moved;
    lanes.once([&] {
      value[j] = count ? norm * norm + (moved > 0 ? far * moved : 0) + pulled - product - e.e.tau[j] * t.b[j] : 0.;
    });
  });
  return linear + team.sum(m, [&](int64_t j) { return value[j]; });
}

// No less than any cost that a plan can meet: the spread, or beyond all of them if some pairs are masked.
template <class Team>
GRADOPS_TEAM double largest_cost(Team& team, const Transport& t, const TransportState& s) {
  const int64_t n = t.cost.n, m = t.cost.m;
  double* masked = s.rows[9];
  team.columns(n, m, [&](int64_t i, const auto& lanes) {
    const double number = lanes.sum(
        m, [&](int64_t j) { return t.a[i] > 0 && t.b[j] > 0 && !(cost_at(t.cost, i, j) < kInfinity) ? 1. : 0.; });
    lanes.once([&] { masked[i] = number; });
  });
  return team.sum(n, [&](int64_t i) { return masked[i]; }) > 0 ? kInfinity : s.spread;
}

// e, the plan of the largest entries at alpha, or if it is nearer to the rows the averaged plan without what is too
// much: where entries tie, which of them are taken is open, and those with the largest weights in the averaged plan do
// less harm than those that rounding would choose.
template <class Team>
GRADOPS_TEAM Evaluation break_ties(Team& team, const Transport& t, const TransportState& s, const AscentState& a,
                                   const double* alpha, const Evaluation& e, double* grad) {
  Evaluation to = e;
  to.support = a.center.support, to.weight = a.center.weight, to.count = a.center.count, to.grad = grad;
  scatter(
      team, t, s, 4 * s.list_work,
      [&](int64_t j, const auto& lanes, double* sum) {
        const int64_t at = j * t.capacity, count = a.now.e.count[j];
        int32_t* row = to.support + at;
        double* weight = to.weight + at;
        lanes.each(count, [&](int64_t k) { row[k] = a.now.e.support[at + k], weight[k] = a.now.e.weight[at + k]; });
        lanes.wait();
        lanes.once([&] {
          to.count[j] = int32_t(count);
          if (count <= t.max_nz) return;
          keep_largest(weight, row, count, t.max_nz);
          for (int64_t k = 0; k < t.max_nz; ++k) weight[k] = alpha[row[k]] - (cost_at(t.cost, row[k], j) - s.shift);
          to.count[j] = int32_t(project_candidates(weight, row, t.max_nz, t.max_nz, t.reg, t.b[j]).kept);
        });
        lanes.wait();
        lanes.add_at(to.count[j], row, [&](int64_t k) { return weight[k]; }, sum);
        lanes.wait();
      },
      [&](int64_t i, double sum) { return t.a[i] - sum; }, grad);
  to.residual = team.sum(t.cost.n, [&](int64_t i) { return __builtin_fabs(grad[i]); });
  return to.residual < e.residual ? to : e;
}

template <class Team>
GRADOPS_TEAM void ascent(Team& team, Transport t, TransportState& s, AscentState& a) {
  const int64_t n = t.cost.n, m = t.cost.m;
  constexpr double kRough = 1e-2, kRatio = 4, kFine = 2, kTight = 1. / 16, kLast = 2.5e-5, kExact = 1e-7;
  constexpr int64_t kStage = 300;  // evaluations
  Transport quadratic = t;
  quadratic.max_nz = 0;
  quadratic.tol = t.tol > kRough ? t.tol : kRough;
  quadratic.gap_tol = kInfinity;
  path_newton(team, quadratic, s);
  if (t.report->status != double(TransportStatus::converged)) return;
  if (t.report->widest <= double(t.max_nz)) {
    const int64_t before = s.evaluations;
    quadratic.alpha0 = t.alpha;
    quadratic.tol = t.tol, quadratic.gap_tol = t.gap_tol, quadratic.max_iter = t.max_iter - before;
    path_newton(team, quadratic, s);
    s.evaluations += before;
    team.once([&] { t.report->n_iter += double(before); });
    if (t.report->widest <= double(t.max_nz)) return;
  }

  t.b = s.columns[3];
  const NewtonVectors v = newton_vectors(s);
  a.now.e = s.now, a.trial.e = s.trial;
  team.each(m, [&](int64_t j) { a.tau[j] = s.now.tau[j], a.theta[j] = a.center.count[j] = 0; });
  const double far = largest_cost(team, t, s);
  double upper = kInfinity, best = -kInfinity, mu = t.reg;
  // With one entry per column the relaxation is a linear program: its vertices are found exactly, or not at all.
  const double last = t.reg * (t.max_nz == 1 ? kExact : kLast), enough = t.max_nz == 1 ? 1e-9 : 4e-6;
  double missing = kInfinity;  // from the bound, last time
  TransportStatus status = TransportStatus::stagnated;
  for (bool more = true; more;) {
    const Smoothing w(t.reg, mu, double(t.max_nz));
    const bool tight = mu <= kTight * t.reg, final = mu <= last;
    const int64_t limit = s.evaluations + kStage < t.max_iter ? s.evaluations + kStage : t.max_iter;
    NewtonEnd end = smooth_evaluate(team, t, s, a, v.alpha, w, a.now) ? NewtonEnd::reached : NewtonEnd::overflow;
    const double rough = a.now.e.residual < 4 * kRough * s.mass ? a.now.e.residual / 4 : kRough * s.mass;
    // Rows that are off by |grad|_1 cost the bound at most that times the largest cost. Rounding ends it before.
    const double fine = enough / 4 * __builtin_fabs(upper) / far, loose = s.mass * t.tol;
    const double exact = 1e-12 * s.mass + 0x1p-52 * double(m) * s.spread / mu;
    const double least = fine < loose ? (fine > exact ? fine : exact) : loose, goal = tight ? least : rough;
    if (end == NewtonEnd::reached) end = smooth_ascend(team, t, s, a, w, goal > least ? goal : least, limit);
    if (end == NewtonEnd::overflow) return give_up(team, t, s, TransportStatus::overflow);
    const double bound = relaxed_value(team, t, s, a, v.alpha, w, far);
    upper = bound < upper ? bound : upper;
    Evaluation plain = a.trial.e;
    if (!evaluate(team, t, s, v.alpha, t.reg, plain)) return give_up(team, t, s, TransportStatus::overflow);
    const bool met = plain.residual <= s.mass * t.tol;
    if (met || plain.value > best) {
      best = plain.value;
      team.each(n, [&](int64_t i) { a.best[i] = v.alpha[i]; });
    }
    if (met) status = TransportStatus::converged, upper = best;
    if (s.evaluations >= t.max_iter && !met) status = TransportStatus::iteration_limit;
    const double raw = __builtin_fabs(upper + s.shift * s.mass), size = raw < upper ? raw : upper;
    more = !met && !final && s.evaluations < t.max_iter && upper - best > enough * size;
    if (more) {
      if (!tight)
        mu /= kRatio;
      else if (upper - best > .5 * missing)
        mu /= kFine;
      if (tight) missing = upper - best;
      const SparseColumns last = {a.now.e.support, a.now.e.weight, a.now.e.count};
      a.now.e.support = a.center.support, a.now.e.weight = a.center.weight, a.now.e.count = a.center.count;
      a.center = last;
    }
  }

  const double ties = team.sum(m, [&](int64_t j) { return double(a.now.e.count[j] > t.max_nz); });
  Evaluation e = a.trial.e;
  if (!evaluate(team, t, s, a.best, t.reg, e)) return give_up(team, t, s, TransportStatus::overflow);
  if (status != TransportStatus::converged) {
    e = break_ties(team, t, s, a, a.best, e, v.next);
    if (e.residual <= s.mass * t.tol)
      status = TransportStatus::converged;
    else if (t.averaged)
      e = a.now.e, e.tau = a.trial.e.tau;
  }
  e.value = best;
  finish(team, t, s, a.best, e, {upper, upper < kInfinity ? (upper - best) / upper : kInfinity}, status);
  team.once([&] { t.report->ties = ties; });
}

// Whichever method the problem asks for.
template <class Team>
GRADOPS_TEAM void solve_one(Team& team, const Transport& t, SolveState& s) {
  if (t.max_nz > 0)
    ascent(team, t, s.transport, s.ascent);
  else
    path_newton(team, t, s.transport);
}

}  // namespace
}  // namespace gradops
