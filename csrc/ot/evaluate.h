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
// rises, and it ends on the exact set. number: how many are above.
template <class Lanes, class X>
GRADOPS_TEAM double threshold(const Lanes& lanes, int64_t count, const X& x, double scaled, double guess,
                              int64_t& number) {
  double tau = guess, excess = lanes.above(count, x, tau, number);
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

// A function of its own: ptxas compiles it once.
GRADOPS_TEAM ProjectedColumn project_candidates(double* x, int32_t* row, int64_t count, int64_t max_nz, double reg,
                                                double mass) {
  return project_column(x, row, count, max_nz, reg, mass);
}

// With max_nz: as project, of one column.
template <class Lanes>
GRADOPS_TEAM void project_few(const Lanes& lanes, const Transport& t, const TransportState& s, const double* alpha,
                              double reg, const Evaluation& e, int64_t j) {
  const Candidates& c = s.lists;
  const int64_t at = j * t.capacity, count = c.count[j];
  const double bound = c.low[j] + c.rise[c.epoch[j] % kEpochs];  // of what is in no list
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

// Thresholds and sizes of the supports of up to kColumns columns from `begin` on, and whether their lists still hold
// all that matters; again: only those whose lists have changed. Leaves the candidates' alpha_i - c_ij in the columns'
// weights, for fill.
//
// A threshold is as threshold() finds it: a few turns, each a chain of operations which waits for the one before.
// Columns take their turns together, so that they wait at the same time.
template <int kColumns, class Lanes>
GRADOPS_TEAM void project(const Lanes& lanes, const Transport& t, const TransportState& s, const double* alpha,
                          double reg, const Evaluation& e, int64_t begin, bool again) {
  const Candidates& c = s.lists;
  const int64_t end = begin + kColumns < t.cost.m ? begin + kColumns : t.cost.m;
  int64_t column[kColumns], number[kColumns], above[kColumns];
  double tau[kColumns], excess[kColumns], next[kColumns], rest[kColumns];
  int open[kColumns], sought = 0;
  for (int64_t j = begin; j < end; ++j) {
    if (again && c.mark[j] == kListGood) continue;
    if (!(t.b[j] > 0))
      lanes.once([&] { e.tau[j] = 0, e.count[j] = 0, c.mark[j] = kListGood; });
    else if (t.max_nz > 0)
      project_few(lanes, t, s, alpha, reg, e, j);
    else
      column[sought++] = j;
  }
  const auto values = [&](int p) { return Values{e.weight + column[p] * t.capacity}; };
  for (int p = 0; p < sought; ++p) {
    const int64_t j = column[p], at = j * t.capacity, count = c.count[j];
    tau[p] = c.guess[j];
    excess[p] = lanes.load_above(count, alpha, count < t.cost.n ? c.index + at : nullptr, c.cost + at, e.weight + at,
                                 tau[p], number[p]);
  }
  lanes.wait();
  for (int p = 0; p < sought; ++p) {
    open[p] = p;
    if (number[p] > 0 && excess[p] < kInfinity) continue;
    const int64_t j = column[p];
    tau[p] = lanes.largest(c.count[j], values(p)) - reg * t.b[j];
    excess[p] = lanes.above(c.count[j], values(p), tau[p], number[p]);
  }
  int left = sought;
  for (int64_t turn = 0; left > 0 && turn <= t.cost.n; ++turn) {
    for (int q = 0; q < left; ++q) {
      const int p = open[q];
      next[p] = tau[p] + (excess[p] - reg * t.b[column[p]]) / double(number[p]);
    }
    for (int q = 0; q < left; ++q) {
      const int p = open[q];
      rest[p] = lanes.above(c.count[column[p]], values(p), next[p], above[p]);
    }
    int more = 0;
    for (int q = 0; q < left; ++q) {  // without branches, which would be guessed before the sums are there
      const int p = open[q];
      const bool rises = number[p] > 0 && (turn == 0 || next[p] > tau[p]), last = above[p] == number[p];
      tau[p] = rises ? next[p] : tau[p];
      excess[p] = rises ? rest[p] : excess[p];
      number[p] = rises ? above[p] : number[p];
      open[more] = p;
      more += rises && !last ? 1 : 0;
    }
    left = more;
  }
  lanes.once([&] {
    for (int p = 0; p < sought; ++p) {
      const int64_t j = column[p];
      const double bound = c.low[j] + c.rise[c.epoch[j] % kEpochs];  // of what is in no list
      e.tau[j] = c.guess[j] = tau[p], e.count[j] = int32_t(number[p]);
      c.mark[j] = bound > tau[p] ? kListStale : list_length(c.count[j], number[p]);
    }
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
    if (t.max_nz == 0 && count > 0) {
      // reg * b_j is lost beside the costs: the largest takes it all, if it has a finite cost and mass.
      const double top = lanes.largest(count, Values{weight});
      kept.count = lanes.keep(
          count, [=](int64_t k) { return Entry{index[k], weight[k]}; },
          [=](Entry v) { return v.x == top && top > kNever / 2; },
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

// visit(j, lanes, sum) for all columns j, in fixed pieces, each with `size` sums of its own, at first 0. work: what one
// column touches.
template <class Team, class Visit>
GRADOPS_TEAM void visit_pieces(Team& team, const Transport& t, const TransportState& s, int64_t work, int64_t size,
                               const Visit& visit) {
  const int64_t m = t.cost.m, pieces = s.pieces;
  team.columns(pieces, work * m / pieces, [&](int64_t p, const auto& lanes) {
    double* sum = s.scatter + p * size;
    lanes.each(size, [&](int64_t i) { sum[i] = 0; });
    lanes.wait();
    for (int64_t j = p * m / pieces; j < (p + 1) * m / pieces; ++j) visit(j, lanes, sum);
  });
}

// q[0] of all eight pieces; no loop, so that rows become vectors.
GRADOPS_TEAM double sum_pieces(const double* q, int64_t n) {
  return ((q[0] + q[n]) + (q[2 * n] + q[3 * n])) + ((q[4 * n] + q[5 * n]) + (q[6 * n] + q[7 * n]));
}

// out_i = start(i, what visit(j, lanes, sum) added to sum[i] over all columns j); the rows of a column differ.
template <class Team, class Visit, class Start>
GRADOPS_TEAM void scatter(Team& team, const Transport& t, const TransportState& s, int64_t work, const Visit& visit,
                          const Start& start, double* out) {
  const int64_t n = t.cost.n;
  visit_pieces(team, t, s, work, n, visit);
  const double* of = s.scatter;
  if (s.pieces == 1)
    team.each(n, [&](int64_t i) { out[i] = start(i, of[i]); });
  else
    team.each(n, [&](int64_t i) { out[i] = start(i, sum_pieces(of + i, n)); });
}

// grad, its size and degree, from what count_at added in all pieces.
template <class Team>
GRADOPS_TEAM void sum_rows(Team& team, const Transport& t, const TransportState& s, Evaluation& e) {
  const int64_t n = t.cost.n;
  const double* of = s.scatter;
  if (s.pieces == 1)
    team.each(n, [&](int64_t i) { e.grad[i] = t.a[i] - of[2 * i], e.degree[i] = of[2 * i + 1]; });
  else
    team.each(n, [&](int64_t i) {
      e.grad[i] = t.a[i] - sum_pieces(of + 2 * i, 2 * n), e.degree[i] = sum_pieces(of + 2 * i + 1, 2 * n);
    });
  e.residual = team.sum(n, [&](int64_t i) { return __builtin_fabs(e.grad[i]); });
}

// False: a column has more candidates than there is room for.
template <class Team>
GRADOPS_TEAM bool evaluate(Team& team, const Transport& t, TransportState& s, const double* alpha, double reg,
                           Evaluation& e) {
  const Candidates& c = s.lists;
  const int64_t n = t.cost.n, m = t.cost.m;
  s.evaluations += 1;
  if (s.lists.newest < 0 && may_list_all(t)) list_all(team, t, s, alpha);
  measure_rise(team, t, s, alpha);
  const int64_t work = 64 + s.list_work;  // a column has its price, however short
  const auto project_columns = [&](bool again) {
    constexpr int kTogether = Team::kTogether;
    team.columns((m + kTogether - 1) / kTogether, kTogether * work, [&](int64_t block, const auto& lanes) {
      project<kTogether>(lanes, t, s, alpha, reg, e, block * kTogether, again);
    });
  };
  project_columns(false);
  const double stale = team.sum(m, [&](int64_t j) { return c.mark[j] == kListStale ? 1. : 0.; });
  const double longs = team.sum(m, [&](int64_t j) { return c.mark[j] == kListLong ? 1. : 0.; });
  if (stale > 0 || longs * 8 > double(m)) {
    if (!refresh(team, t, s, alpha, reg, 0.)) return false;
    project_columns(true);
  }
  visit_pieces(team, t, s, work, 2 * n, [&](int64_t j, const auto& lanes, double* sums) {
    fill(lanes, t, s, reg, e, j);
    lanes.wait();
    lanes.count_at(e.count[j], e.support + j * t.capacity, e.weight + j * t.capacity, sums);
    lanes.wait();
  });
  sum_rows(team, t, s, e);
  const double linear = team.sum(n, [&](int64_t i) { return t.a[i] > 0 ? alpha[i] * t.a[i] : 0.; });
  e.value = linear - team.sum(m, [&](int64_t j) { return t.b[j] > 0 ? s.columns[1][j] : 0.; });
  e.work = 1 + int64_t(team.sum(m, [&](int64_t j) { return 2. * double(e.count[j]); }) / double(m));
  s.list_work = 1 + int64_t(team.sum(m, [&](int64_t j) { return double(c.count[j]); }) / double(m));
  return true;
}

}  // namespace
}  // namespace gradops
