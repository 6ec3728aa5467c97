// evaluate.h: D, its supergradient and the plan at one alpha, from the columns' lists of candidates.
// Written for any Team (ot/team.h); local to the includer.
#pragma once
#include "ot/candidates.h"
#include "ot/column_projection.h"

namespace gradops {
namespace {

struct Entry {
  int32_t row;
  double x;
};

// Where `row` is among ascending rows, or -1.
GRADOPS_TEAM int64_t place_of(const int32_t* rows, int64_t count, int64_t row) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows[middle] < row)
      low = middle + 1;
    else
      high = middle;
  }
  return low < count && rows[low] == row ? low : -1;
}

// Moves the x(k) > level, less level, to the front of x and their rows to `row`, in order.
template <class Lanes>
GRADOPS_TEAM Kept keep_above(const Lanes& lanes, int64_t count, const int32_t* index, double* x, double level,
                             int32_t* row) {
  const int64_t kept = lanes.keep(
      count, [=](int64_t k) { return Entry{index[k], x[k] - level}; }, [](Entry v) { return v.x > 0; },
      [=](Entry v, int64_t place) { row[place] = v.row, x[place] = v.x; });
  lanes.wait();
  return {kept, lanes.sum(kept, Values{x}), lanes.sum(kept, [=](int64_t k) { return x[k] * x[k]; })};
}

// tau with sum_k (x(k) - tau)_+ = scaled, by Newton on a convex piecewise linear function: after one step it only
// rises, and it ends on the exact set. From a guess, and excess and number, what above() says of it; number becomes how
// many are above.
template <class Lanes, class X>
GRADOPS_TEAM double threshold_from(const Lanes& lanes, int64_t count, const X& x, double scaled, double tau,
                                   double excess, int64_t& number) {
  if (number == 0 || !(excess < kInfinity)) {  // a bad guess, or none: one entry alone would take all the mass
    tau = lanes.largest(count, x) - scaled;
    excess = lanes.above(count, x, tau, number);
  }
  for (int64_t turn = 0; turn <= count && number > 0; ++turn) {
    const double next = tau + (excess - scaled) / double(number);
    if (turn > 0 && next <= tau) break;  // rounding
    int64_t above;
    excess = lanes.above(count, x, next, above);
    tau = next;
    if (above == number) break;
    number = above;
  }
  return tau;
}
template <class Lanes, class X>
GRADOPS_TEAM double threshold(const Lanes& lanes, int64_t count, const X& x, double scaled, double guess,
                              int64_t& number) {
  const double excess = lanes.above(count, x, guess, number);
  return threshold_from(lanes, count, x, scaled, guess, excess, number);
}

// A function of its own: ptxas compiles it once.
GRADOPS_TEAM ProjectedColumn project_candidates(double* x, int32_t* row, int64_t count, int64_t max_nz, double reg,
                                                double mass) {
  return project_column(x, row, count, max_nz, reg, mass);
}

// With max_nz: as project.
template <class Lanes>
GRADOPS_TEAM void project_few(const Lanes& lanes, const Transport& t, const TransportState& s, const double* alpha,
                              double reg, const Evaluation& e, double bound, int64_t j) {
  const Candidates& c = s.lists;
  const int64_t at = j * t.capacity, count = c.count[j];
  const int32_t* index = c.index + at;
  double *x = e.weight + at, *smallest = s.columns[0] + j;
  int32_t* row = e.support + at;
  // A level that at least max_nz entries are above: their largest are among those.
  double level = c.guess[j];
  int64_t number;
  lanes.load_above(count, alpha, index, c.cost + at, x, level, number);
  lanes.wait();
  const double height = lanes.largest(count, Values{x}) - level;
  for (double drop = .125; drop < 9 && number < t.max_nz && height > 0; drop *= 4) {
    level = c.guess[j] - drop * height;
    lanes.above(count, Values{x}, level, number);
  }
  const bool few = number >= t.max_nz;
  const int64_t most = lanes.keep(
      count, [=](int64_t k) { return Entry{index[k], x[k]}; }, [=](Entry v) { return !few || v.x > level; },
      [=](Entry v, int64_t place) { row[place] = v.row, x[place] = v.x; });
  lanes.wait();
  lanes.once([&] {
    const ProjectedColumn p = project_candidates(x, row, most, t.max_nz, reg, t.b[j]);
    e.count[j] = int32_t(p.kept), e.tau[j] = p.tau, *smallest = p.smallest;
    c.guess[j] = p.tau > p.smallest ? p.tau : p.smallest;
    c.mark[j] = bound > p.tau && bound >= p.smallest ? kListStale : list_length(count, p.kept);
  });
}

// Threshold and size of column j's support, and whether its list still holds all that matters. Leaves the candidates'
// alpha_i - c_ij in the column's weights, for fill.
template <class Lanes>
GRADOPS_TEAM void project(const Lanes& lanes, const Transport& t, const TransportState& s, const double* alpha,
                          double reg, const Evaluation& e, int64_t j) {
  const Candidates& c = s.lists;
  const int64_t at = j * t.capacity, count = c.count[j];
  if (!(t.b[j] > 0)) {
    lanes.once([&] { e.tau[j] = 0, e.count[j] = 0, c.mark[j] = kListGood; });
    return;
  }
  const double bound = c.low[j] + c.rise[c.epoch[j] % kEpochs];  // of what is in no list
  if (t.max_nz > 0) return project_few(lanes, t, s, alpha, reg, e, bound, j);
  double* x = e.weight + at;
  int64_t number;
  const double excess = lanes.load_above(count, alpha, c.index + at, c.cost + at, x, c.guess[j], number);
  lanes.wait();
  const double tau = threshold_from(lanes, count, Values{x}, reg * t.b[j], c.guess[j], excess, number);
  lanes.once([&] {
    e.tau[j] = c.guess[j] = tau, e.count[j] = int32_t(number);
    c.mark[j] = bound > tau ? kListStale : list_length(count, number);
  });
}

// The entries of column j, which sum to b_j, from what project left.
template <class Lanes>
GRADOPS_TEAM void fill(const Lanes& lanes, const Transport& t, const TransportState& s, double reg, const Evaluation& e,
                       int64_t j) {
  const int64_t at = j * t.capacity, count = s.lists.count[j];
  const int32_t* index = s.lists.index + at;
  double* weight = e.weight + at;
  int32_t* row = e.support + at;
  if (!(t.b[j] > 0)) return;
  Kept kept{e.count[j], 0, 0};
  if (t.max_nz == 0 && kept.count > 0) {
    kept = keep_above(lanes, count, index, weight, e.tau[j], row);
  } else {
    if (t.max_nz == 0 && count > 0) {  // reg * b_j is lost beside the costs: the largest takes it all
      const double top = lanes.largest(count, Values{weight});
      kept.count = lanes.keep(
          count, [=](int64_t k) { return Entry{index[k], weight[k]}; }, [=](Entry v) { return v.x == top; },
          [=](Entry v, int64_t place) { row[place] = v.row, weight[place] = 1; });
      lanes.wait();
    }
    kept.sum = lanes.sum(kept.count, Values{weight});
    kept.squares = lanes.sum(kept.count, [=](int64_t k) { return weight[k] * weight[k]; });
  }
  lanes.wait();
  const double scale = t.b[j] / kept.sum;
  lanes.each(kept.count, [=](int64_t k) { weight[k] *= scale; });
  lanes.once([&] {
    e.count[j] = int32_t(kept.count);
    s.columns[1][j] = e.tau[j] * t.b[j] + .5 * reg * scale * scale * kept.squares;
  });
}

// out_i = start(i, what visit(j, lanes, sum) added to sum[i] over all columns j): columns in fixed pieces, each with
// sums of its own; the rows of a column differ. work: what one column touches.
template <class Team, class Visit, class Start>
GRADOPS_TEAM void scatter(Team& team, const Transport& t, const TransportState& s, int64_t work, const Visit& visit,
                          const Start& start, double* out) {
  const int64_t n = t.cost.n, m = t.cost.m, pieces = s.pieces;
  team.columns(pieces, work * m / pieces, [&](int64_t p, const auto& lanes) {
    double* sum = s.scatter + p * n;
    lanes.each(n, [&](int64_t i) { sum[i] = 0; });
    lanes.wait();
    for (int64_t j = p * m / pieces; j < (p + 1) * m / pieces; ++j) visit(j, lanes, sum);
  });
  const double* of = s.scatter;
  if (pieces == 1)
    team.each(n, [&](int64_t i) { out[i] = start(i, of[i]); });
  else
    team.each(n, [&](int64_t i) {  // no loop, so that rows become vectors
      const double* q = of + i;
      out[i] = start(i, ((q[0] + q[n]) + (q[2 * n] + q[3 * n])) + ((q[4 * n] + q[5 * n]) + (q[6 * n] + q[7 * n])));
    });
}

// False: a column has more candidates than there is room for.
template <class Team>
GRADOPS_TEAM bool evaluate(Team& team, const Transport& t, TransportState& s, const double* alpha, double reg,
                           Evaluation& e) {
  const Candidates& c = s.lists;
  const int64_t n = t.cost.n, m = t.cost.m;
  s.evaluations += 1;
  measure_rise(team, t, s, alpha);
  const int64_t work = 64 + s.list_work;  // a column has its price, however short
  team.columns(m, work, [&](int64_t j, const auto& lanes) { project(lanes, t, s, alpha, reg, e, j); });
  const double stale = team.sum(m, [&](int64_t j) { return c.mark[j] == kListStale ? 1. : 0.; });
  const double longs = team.sum(m, [&](int64_t j) { return c.mark[j] == kListLong ? 1. : 0.; });
  if (stale > 0 || longs * 8 > double(m)) {
    if (!refresh(team, t, s, alpha, reg, 0.)) return false;
    team.columns(m, work, [&](int64_t j, const auto& lanes) {  // lists have changed
      if (c.mark[j] != kListGood) project(lanes, t, s, alpha, reg, e, j);
    });
  }
  scatter(
      team, t, s, work,
      [&](int64_t j, const auto& lanes, double* sum) {
        fill(lanes, t, s, reg, e, j);
        lanes.wait();
        const double* weight = e.weight + j * t.capacity;
        const int32_t* row = e.support + j * t.capacity;
        lanes.add_at(e.count[j], row, [&](int64_t k) { return weight[k]; }, sum);
        lanes.wait();
      },
      [&](int64_t i, double sum) { return t.a[i] - sum; }, e.grad);
  const double linear = team.sum(n, [&](int64_t i) { return t.a[i] > 0 ? alpha[i] * t.a[i] : 0.; });
  e.value = linear - team.sum(m, [&](int64_t j) { return t.b[j] > 0 ? s.columns[1][j] : 0.; });
  e.residual = team.sum(n, [&](int64_t i) { return __builtin_fabs(e.grad[i]); });
  e.work = 1 + int64_t(team.sum(m, [&](int64_t j) { return 2. * double(e.count[j]); }) / double(m));
  s.list_work = 1 + int64_t(team.sum(m, [&](int64_t j) { return double(c.count[j]); }) / double(m));
  return true;
}

}  // namespace
}  // namespace gradops
