// path_newton.h: quadratically regularised transport by continuation in reg and damped semismooth Newton in the
// semi-dual, with conjugate gradients. For any Team; local to the includer.
#pragma once
#include "ot/components.h"
#include "ot/frame.h"
#include "ot/polish.h"

namespace gradops {
namespace {

// Names for the state's vectors of n.
struct NewtonVectors {
  double *alpha, *next, *step, *degree, *rhs;
  CgVectors cg;
};
GRADOPS_TEAM NewtonVectors newton_vectors(const TransportState& s) {
  return {s.rows[0], s.rows[1], s.rows[2], s.rows[3], s.rows[4], {s.rows[5], s.rows[6], s.rows[7], s.rows[8]}};
}

enum class NewtonEnd { reached, limit, stalled, overflow, infeasible };

// From what was tried.
template <class Team>
GRADOPS_TEAM void take(Team& team, const Transport& t, TransportState& s) {
  const NewtonVectors v = newton_vectors(s);
  team.each(t.cost.n, [&](int64_t i) { v.alpha[i] = v.next[i]; });
  const Evaluation accepted = s.trial;
  s.trial = s.now;
  s.now = accepted;
}

// The step of ot/components.h, if D rises.
template <class Team>
GRADOPS_TEAM NewtonEnd raise(Team& team, const Transport& t, TransportState& s, double reg, double little,
                             bool& raised) {
  const NewtonVectors v = newton_vectors(s);
  raised = false;
  const Rise rise = raise_components(team, t, s, s.now, reg, little, v.alpha, v.cg, v.step);
  if (rise == Rise::endless) return NewtonEnd::infeasible;
  if (rise == Rise::none || s.evaluations >= t.max_iter) return NewtonEnd::reached;
  team.each(t.cost.n, [&](int64_t i) { v.next[i] = v.alpha[i] + v.step[i]; });
  if (!evaluate(team, t, s, v.next, reg, s.trial)) return NewtonEnd::overflow;
  raised = s.trial.value > s.now.value;
  if (raised) take(team, t, s);
  return NewtonEnd::reached;
}

// Raises D at this reg from v.alpha, whose evaluation is s.now, until |grad|_1 <= goal, or rounding alone decides about
// the steps. mu: Levenberg and Marquardt's damping relative to the residual.
template <class Team>
GRADOPS_TEAM NewtonEnd ascend(Team& team, const Transport& t, TransportState& s, double reg, double goal, double& mu) {
  const int64_t n = t.cost.n;
  const NewtonVectors v = newton_vectors(s);
  constexpr int kPatience = 40;
  // What a row may lack without being looked after: together no more than an eighth of the goal. Of rows of next to no
  // mass, each pulled up to take it, many would take much more than theirs after the next step.
  const double little = goal / (8 * double(n));
  int steps = 0, idle = 0;  // idle: steps in a row that neither raised D, beyond rounding, nor lowered the residual
  double least = s.now.residual;
  while (s.now.residual > goal) {
    if (idle > kPatience && (s.now.residual <= 2 * least || idle > 10 * kPatience)) return NewtonEnd::stalled;
    const Evaluation& e = s.now;
    const double relative = e.residual / s.mass, mean = team.sum(n, [&](int64_t i) { return e.degree[i]; }) / double(n);
    // A row in no support has no curvature: it takes its exact step alone, and must not stop conjugate gradients.
    team.each(n, [&](int64_t i) { v.rhs[i] = e.degree[i] > 0 ? reg * e.grad[i] : 0.; });
    const double lone = team.sum(n, [&](int64_t i) { return e.degree[i] == 0 && t.a[i] > little ? 1. : 0.; });
    double gain = 0, change = 0, lam = 0, length = 1;
    bool ascends = false, raised = false;
    while (!ascends && !raised) {
      if (s.evaluations >= t.max_iter) return NewtonEnd::limit;
      lam = mu * (relative < 1 ? relative : 1) * (mean > 1 ? mean : 1);
      const double rtol = relative < 0.01 ? __builtin_sqrt(relative) : 0.1;
      s.products += conjugate_gradients(
          team, n, [&](const double* x, double* y) { laplacian_apply(team, t, s, e, lam, x, y); }, e.degree, lam, v.rhs,
          rtol, 300, v.cg, v.step);
      s.newton += 1;
      if (lone > 0)
        team.columns(n, 1 + int64_t(lone * double(t.cost.m) / double(n)), [&](int64_t i, const auto& lanes) {
          if (e.degree[i] > 0 || !(t.a[i] > little)) return;
          const double alpha = row_update(lanes, t, s, e, reg, i);
          lanes.once([&] { v.step[i] = alpha - v.alpha[i]; });
        });
      gain = team.sum(n, [&](int64_t i) { return e.grad[i] * v.step[i]; });
      const double size = __builtin_fabs(e.value) + s.mass * s.spread, before = e.value;
      for (length = 1;;) {
        team.each(n, [&](int64_t i) { v.next[i] = t.a[i] > 0 ? v.alpha[i] + length * v.step[i] : kNever; });
        if (!evaluate(team, t, s, v.next, reg, s.trial)) return NewtonEnd::overflow;
        change = team.sum(n, [&](int64_t i) { return s.trial.grad[i] * v.step[i]; });
        // D is concave: D(next) - D >= length change, which rounding of D, a sum of larger numbers, cannot hide.
        const double rise = s.trial.value - e.value;
        ascends = change >= 0 || rise >= 1e-4 * length * gain + 1e-15 * size ||
                  (__builtin_fabs(change) <= .5 * gain && __builtin_fabs(rise) <= 1e-14 * size);
        idle = s.trial.residual < .9 * least || __builtin_fabs(rise) > 1e-14 * size ? 0 : idle + 1;
        least = s.trial.residual < least ? s.trial.residual : least;
        // Once more, by false position on the slope: cheaper than another direction, unless it is off by far, or goes
        // wrong at lone rows, of which a part of their step makes nothing.
        const double cut = gain / (gain - change);
        if (ascends || length < 1 || cut < .1 || lone > 2 || s.evaluations >= t.max_iter) break;
        length = cut > .7 ? .7 : cut;
      }
      if (ascends) break;
      if (mu > 1e12) return NewtonEnd::stalled;
      mu *= 4;
      // Perhaps it went astray where there is no curvature.
      const NewtonEnd end = raise(team, t, s, reg, little, raised);
      if (end != NewtonEnd::reached) return end;
      if (raised && s.now.value - before > 1e-14 * size) idle = 0;
    }
    if (raised) continue;
    // How much of what the model promised was gained, by the trapezoid of the slopes, without the lone rows.
    // Conjugate gradients left cg.rest = rhs - (L + lam) step.
    const auto counted = [&](int64_t i) { return e.degree[i] > 0 ? v.step[i] : 0.; };
    const double slopes = team.sum(n, [&](int64_t i) { return (e.grad[i] + s.trial.grad[i]) * counted(i); });
    const double promised = team.sum(n, [&](int64_t i) {
      const double product = v.rhs[i] - v.cg.rest[i] - lam * v.step[i];
      return (e.grad[i] - .5 * product / reg) * counted(i);
    });
    const double ratio = .5 * slopes / (promised + 1e-300);
    if (length < 1)
      mu *= 4;
    else if (ratio > .5)
      mu = mu / 2.5 > 1e-10 ? mu / 2.5 : 1e-10;
    else if (ratio < .1)
      mu *= 2;
    take(team, t, s);
    if (change > .5 * gain || ++steps % 8 == 0) {  // it met little, and could have gone on; or this takes long
      const NewtonEnd end = raise(team, t, s, reg, little, raised);
      if (end != NewtonEnd::reached) return end;
    }
  }
  return NewtonEnd::reached;
}

// alpha is piecewise linear in reg: along the tangent to the next one.
template <class Team>
GRADOPS_TEAM void predict(Team& team, const Transport& t, TransportState& s, double reg, double next) {
  const int64_t n = t.cost.n;
  const NewtonVectors v = newton_vectors(s);
  const Evaluation& e = s.now;
  scatter(
      team, t, s, e.work,
      [&](int64_t j, const auto& lanes, double* sum) {
        const double *weight = e.weight + j * t.capacity, even = t.b[j] / double(e.count[j]);
        const int32_t* row = e.support + j * t.capacity;
        lanes.add_at(e.count[j], row, [&](int64_t k) { return weight[k] - even; }, sum);
        lanes.wait();
      },
      [](int64_t, double sum) { return sum; }, v.rhs);
  s.products += conjugate_gradients(
      team, n, [&](const double* x, double* y) { laplacian_apply(team, t, s, e, 1e-3, x, y); }, e.degree, 1e-3, v.rhs,
      1e-2, 300, v.cg, v.step);
  team.each(n, [&](int64_t i) {
    if (t.a[i] > 0) v.alpha[i] += (next - reg) * v.step[i];
  });
}

template <class Team>
GRADOPS_TEAM void path_newton(Team& team, Transport t, TransportState& s) {
  const TransportStatus good = begin(team, t, s);
  if (good != TransportStatus::converged) return give_up(team, t, s, good);
  const int64_t n = t.cost.n, m = t.cost.m;
  const NewtonVectors v = newton_vectors(s);
  start_alpha(team, t, s, v.alpha);
  constexpr double kRatio = 4, kStart = 0.002, kDamping = 0.3, kNear = 0.3;
  bool ready = false;  // s.now is the evaluation at v.alpha and reg
  if (t.alpha0) {      // worth more than a path only if it is near
    team.each(n, [&](int64_t i) { v.next[i] = t.a[i] > 0 ? t.alpha0[i] : kNever; });
    ready = evaluate(team, t, s, v.next, t.reg, s.now) && s.now.residual <= kNear * s.mass;
    if (ready)
      team.each(n, [&](int64_t i) { v.alpha[i] = v.next[i]; });
    else
      forget_lists(team, t, s);
  }
  const double far = kStart * double(n) * double(m) * s.spread / s.mass;  // here supports are nearly full
  int64_t stages = 0;
  double reg = t.reg;
  for (; !ready && reg < far; reg *= kRatio) ++stages;
  double mu = kDamping, tol = t.tol;
  // Supports that are far from those of their reg make the next stages hard: where one takes long, the path is followed
  // more closely from there on.
  double inner = 0.01;
  NewtonEnd end = NewtonEnd::reached;
  for (bool cold = true;; --stages, reg /= kRatio) {
    if (!ready && !evaluate(team, t, s, v.alpha, reg, s.now)) {
      if (!cold || stages == 0) return give_up(team, t, s, TransportStatus::overflow);
      forget_lists(team, t, s);  // too little room for the supports of so large a reg: begin with a smaller one
      continue;
    }
    ready = cold = false;
    if (unreachable(team, t, s.now)) return give_up(team, t, s, TransportStatus::infeasible);
    mu = kDamping;
    const int64_t before = s.evaluations;
    end = ascend(team, t, s, reg, s.mass * (stages > 0 ? inner : tol), mu);
    if (s.evaluations - before > 4 && inner > 2e-3) inner /= 4;
    if (end == NewtonEnd::overflow) return give_up(team, t, s, TransportStatus::overflow);
    if (end == NewtonEnd::infeasible) return give_up(team, t, s, TransportStatus::infeasible);
    if (end != NewtonEnd::reached || stages == 0) break;
    predict(team, t, s, reg, reg / kRatio);
  }
  if (stages > 0) {  // stopped on the way: what there is counts at the reg that was asked for
    reg = t.reg;
    if (!evaluate(team, t, s, v.alpha, reg, s.now)) return give_up(team, t, s, TransportStatus::overflow);
  }
  Certificate found = certify(team, t, s, v.alpha, s.now);
  // The gap is relative to the value; to a thousandth of what the costs could make it where the optimum is nearer to
  // their minimum than that: rounding would hide more.
  const auto missing = [&](const Certificate& c) {  // how many times too large it is
    const double least = 1e-3 * s.mass * s.spread, size = c.primal > least ? c.primal : least;
    const double excess = c.gap * c.primal;
    return excess <= 0 ? 0 : excess / (t.gap_tol * size);  // nothing costs anything, or rounding
  };
  bool met = s.now.residual <= s.mass * t.tol && missing(found) <= 1;
  while (!met && (end == NewtonEnd::reached || end == NewtonEnd::stalled)) {
    const double rtol = 0.1 / (4 + 2 * missing(found));  // the gap falls as what the marginals lack does
    const int64_t most = end == NewtonEnd::stalled ? 300 + 2 * n : 300;  // this is the last chance
    if (polish(team, t, s, reg, rtol, most, v.alpha, v.next, v.rhs, v.cg, v.step)) {
      const Certificate better = certify(team, t, s, v.next, s.trial);
      met = s.trial.residual <= s.mass * t.tol && missing(better) <= 1;
      if (met) {
        take(team, t, s);
        found = better;
      }
    }
    if (met || end == NewtonEnd::stalled || !(s.now.residual > 0)) break;
    while (s.mass * tol >= s.now.residual) tol /= 4;
    if (tol <= 1e-14) break;
    mu = 1e-3;
    end = ascend(team, t, s, reg, s.mass * tol, mu);
    if (end == NewtonEnd::overflow) return give_up(team, t, s, TransportStatus::overflow);
    if (end == NewtonEnd::infeasible) return give_up(team, t, s, TransportStatus::infeasible);
    found = certify(team, t, s, v.alpha, s.now);
    met = s.now.residual <= s.mass * t.tol && missing(found) <= 1;
  }
  finish(team, t, s, v.alpha, s.now, found,
         met                       ? TransportStatus::converged
         : end == NewtonEnd::limit ? TransportStatus::iteration_limit
                                   : TransportStatus::stalled);
}

}  // namespace
}  // namespace gradops
