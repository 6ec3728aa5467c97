// smooth_column.h: one column of the smoothed cardinality constraint. For any Lanes (ot/team.h); local to the includer.
//
// With max_nz = k a column pays omega(x) = max <x, t> - reg/2 |t|^2 over t >= 0 that sum to b and have at most k
// entries; it has a kink where the k-th and the next value agree. Its conjugate is half of reg times the squared
// k-support norm (Argyriou, Foygel and Srebro 2012). Subtracting mu/2 |t|^2 there makes omega smooth:
//   t_i = min((u_i - theta)_+ / mu, (u_i)_+ / (reg + mu)),   u = x - tau,
// with tau such that t sums to b, and theta >= 0 such that sum_i min(1, (u_i - theta)_+ reg / (mu theta)) = k, or 0 if
// at most k entries are positive. mu -> 0 gives back the k largest; mu -> infinity the quadratic problem. Entries with
// u_i >= theta (reg + mu) / reg are "full", those between share what is left of k. Around a center z, mu/2 |t - z|^2,
// it is the same with mu z added to x.
#pragma once
#include "ot/evaluate.h"

namespace gradops {
namespace {

struct Smoothing {
  double reg, mu;
  double k;            // max_nz
  double whole, part;  // reg times the derivative in its own x of an entry that is full, and of one that shares

  GRADOPS_SHARED Smoothing(double reg, double mu, double k)
      : reg(reg), mu(mu), k(k), whole(reg / (reg + mu)), part(reg / mu) {}
  // The least u of a full entry is steep * theta.
  GRADOPS_SHARED double steep() const { return 1 + mu / reg; }
  // An entry's t says which kind it is: below theta / reg it shares.
  GRADOPS_SHARED bool full(double t, double theta) const { return t * reg >= theta; }
  // t of an entry whose u is theta + x.
  GRADOPS_SHARED double entry(double x, double theta) const {
    const double shared = x / mu, whole = (x + theta) / (reg + mu);
    return shared < whole ? shared : whole;
  }
  // u of an entry, given t.
  GRADOPS_SHARED double height(double t, double theta) const {
    return full(t, theta) ? (reg + mu) * t : mu * t + theta;
  }
  GRADOPS_SHARED double slope(double t, double theta) const { return full(t, theta) ? whole : part; }
};

struct ColumnLevels {
  double tau, theta;
};

// Sums over a column at given levels.
struct ColumnSums {
  int64_t active, full;  // how many are above theta, and full
  double mass;           // sum of t
  double shared;         // sum of u - theta over those that share
};

template <class Lanes, class X>
GRADOPS_TEAM ColumnSums column_sums(const Lanes& lanes, int64_t count, const X& x, const Smoothing& w, ColumnLevels l) {
  ColumnSums s;
  const double above = lanes.above(count, x, l.tau + l.theta, s.active);
  const double top = lanes.above(count, x, l.tau + l.theta * w.steep(), s.full);
  const double whole = top + double(s.full) * l.theta * w.steep();  // sum of u over the full ones
  s.shared = s.active > s.full ? above - (whole - double(s.full) * l.theta) : 0.;
  s.mass = whole / (w.reg + w.mu) + s.shared / w.mu;
  return s;
}

// reg times the derivatives of (mass, cardinality) in (tau, theta): [p q; q r], cardinality in units of theta.
struct LevelSlopes {
  double p, q, r;
  GRADOPS_TEAM LevelSlopes(const Smoothing& w, int64_t active, int64_t full) {
    q = double(active - full) * w.part;
    p = q + double(full) * w.whole;
    r = q + w.k - double(full);
  }
  // [p q; q r] (x, y) = (e, f); without shared entries theta is not determined and stays.
  GRADOPS_TEAM void solve(double e, double f, double& x, double& y) const {
    const double determinant = p * r - q * q;
    if (q > 0 && determinant > 1e-14 * p * r) {
      const double inverse = 1 / determinant;
      x = (r * e - q * f) * inverse;
      y = (p * f - q * e) * inverse;
    } else {
      x = p > 0 ? e / p : 0;
      y = 0;
    }
  }
};

// Where exactly k entries are full, theta may be anything from the next one's u, or 0, to steep() times less than the
// least of theirs. At an end of that, where Newton lands, rounding would decide whether one entry more shares, and so
// about slopes that there are not: theta becomes one number within.
template <class Lanes, class X>
GRADOPS_TEAM double settled(const Lanes& lanes, int64_t count, const X& x, const Smoothing& w, const ColumnSums& s,
                            ColumnLevels l) {
  if (double(s.active) != w.k && double(s.full) != w.k) return l.theta;
  const double level = l.tau + (double(s.active) == w.k ? l.theta : l.theta * w.steep());  // k entries are above
  const double next = lanes.largest(count, [&](int64_t k) { return x(k) > level ? -kInfinity : x(k); });
  const double least = -lanes.largest(count, [&](int64_t k) { return x(k) > level ? -x(k) : -kInfinity; });
  const double low = next > l.tau ? next - l.tau : 0, high = (least - l.tau) / w.steep();
  return low + 63. / 64 * (high - low);
}

// theta for a given tau, by Newton within brackets on 1 / theta, in which the cardinality is piecewise linear and
// rises.
template <class Lanes, class X>
GRADOPS_TEAM double theta_at(const Lanes& lanes, int64_t count, const X& x, const Smoothing& w, double tau,
                             double largest) {
  int64_t positive;
  lanes.above(count, x, tau, positive);
  if (double(positive) <= w.k) return 0;
  double low = 1 / (largest - tau), high = kInfinity, inverse = low * w.steep();
  ColumnSums s{-1, -1, 0, 0};
  bool exact = false;  // the last step leads to the root if it changes no entry's kind
  for (int turn = 0; turn < 200; ++turn) {
    const double theta = 1 / inverse, slope = w.part;
    const int64_t active = s.active, full = s.full;
    s = column_sums(lanes, count, x, w, {tau, theta});
    const double excess = double(s.full) + s.shared * slope * inverse - w.k;
    if (__builtin_fabs(excess) <= 1e-14 * w.k || (exact && s.active == active && s.full == full)) break;
    (excess > 0 ? high : low) = inverse;
    const double rise = (s.shared + double(s.active - s.full) * theta) * slope;
    double next = inverse - excess / rise;
    exact = next > low && next < high;
    if (!exact) next = high < kInfinity ? .5 * (low + high) : 2 * inverse;
    if (next == inverse) break;
    inverse = next;
  }
  return settled(lanes, count, x, w, s, {tau, 1 / inverse});
}

// (tau, theta) of a column of mass b. First Newton on both, which ends exactly on the right kinds of entries, mostly
// after two or three sums from the last evaluation's levels; if it circles, two nested searches.
template <class Lanes, class X>
GRADOPS_TEAM ColumnLevels column_levels(const Lanes& lanes, int64_t count, const X& x, const Smoothing& w, double b,
                                        ColumnLevels guess) {
  ColumnLevels l = guess;
  int64_t active = -1, full = -1;
  for (int turn = 0; turn < 12 && l.theta > 0; ++turn) {
    const ColumnSums s = column_sums(lanes, count, x, w, l);
    if (s.active == active && s.full == full) return {l.tau, settled(lanes, count, x, w, s, l)};
    active = s.active, full = s.full;
    if (active == 0 || double(full) > w.k || (active == full && double(full) < w.k)) break;
    double x_step, y_step;
    LevelSlopes(w, active, full)
        .solve(w.reg * (s.mass - b), w.part * s.shared - (w.k - double(full)) * l.theta, x_step, y_step);
    l.tau += x_step, l.theta += y_step;
  }
  int64_t number;
  const double tau = threshold(lanes, count, x, (w.reg + w.mu) * b, guess.tau, number);
  if (double(number) <= w.k) return {tau, 0};  // the constraint does not bind
  const double largest = lanes.largest(count, x);
  double low = -kInfinity, high = largest;
  l.tau = tau;  // theta > 0 takes mass away: the root is below
  for (int turn = 0; turn < 200; ++turn) {
    l.theta = theta_at(lanes, count, x, w, l.tau, largest);
    const ColumnSums s = column_sums(lanes, count, x, w, l);
    const double excess = s.mass - b;
    if (__builtin_fabs(excess) <= 1e-14 * b) break;
    (excess > 0 ? low : high) = l.tau;
    const LevelSlopes d(w, s.active, s.full);
    const double slope = l.theta > 0 && d.r > 0 ? d.p - d.q * d.q / d.r : d.p;
    double next = l.tau + w.reg * excess / slope;
    if (!(next > low && next < high)) next = low > -kInfinity ? .5 * (low + high) : largest - 2 * (largest - l.tau);
    if (next == l.tau || next == low || next == high) break;
    l.tau = next;
  }
  return l;
}

}  // namespace
}  // namespace gradops
