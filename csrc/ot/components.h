// components.h: rows and columns that share mass are the connected components of a graph. A common shift of one's
// potentials moves no mass inside it, so that a model of second order sees no end to the rise of one whose rows lack
// mass. There is one: where the columns of another component begin to give. For any Team; local to the includer.
#pragma once
#include "ot/laplacian.h"

namespace gradops {
namespace {

GRADOPS_TEAM int32_t root_of(int32_t* parent, int32_t i) {
  while (parent[i] != i) i = parent[i] = parent[parent[i]];
  return i;
}

// s.component: for every row the row that stands for its component, then for every column, or -1 if it is empty.
// lack: for the rows that stand for components, how much mass their rows lack; 0 for the others. One thread.
GRADOPS_TEAM void find_components(const Transport& t, const TransportState& s, const Evaluation& e, double* lack) {
  const int64_t n = t.cost.n, m = t.cost.m;
  int32_t *of_row = s.component, *of_column = of_row + n;
  int64_t separate = -1;  // joins until all are one, which wide supports soon are
  for (int64_t i = 0; i < n; ++i) of_row[i] = int32_t(i), lack[i] = 0, separate += e.degree[i] > 0;
  for (int64_t j = 0; j < m && separate > 0; ++j) {
    const int32_t* row = e.support + j * t.capacity;
    for (int64_t k = 1; k < e.count[j]; ++k) {
      const int32_t root = root_of(of_row, row[k]), to = root_of(of_row, row[0]);
      of_row[root] = to;
      separate -= root != to;
    }
  }
  for (int64_t i = 0; i < n; ++i) lack[of_row[i] = root_of(of_row, int32_t(i))] += e.grad[i];
  for (int64_t j = 0; j < m; ++j) of_column[j] = e.count[j] > 0 ? of_row[e.support[j * t.capacity]] : -1;
}

enum class Rise { none, some, endless };

// step: components that lack more than `little` rise by the shortest way, over others that lack mass too, to one that
// does not, whose edges are the least alpha_i - c_ij - tau_j short of an entry; so D rises steadily up to there. And by
// reg times what they lack: an entry of all of that. The others stay. Where no way leads out of some components that
// together lack more than t.tol of the mass, and more than rounding, costs of infinity shut them in, and the problem
// has no solution (Hall's condition): endless. Uses columns[0].
template <class Team>
GRADOPS_TEAM Rise raise_components(Team& team, const Transport& t, const TransportState& s, const Evaluation& e,
                                   double reg, double little, const double* alpha, const CgVectors& w, double* step) {
  const int64_t n = t.cost.n, m = t.cost.m;
  const int32_t *of_row = s.component, *of_column = of_row + n;
  double *lack = w.rest, *rise = w.scaled, *short_of = w.direction, *price = s.columns[0];
  team.once([&] { find_components(t, s, e, lack); });
  team.each(n, [&](int64_t i) { rise[i] = lack[i] > little ? kInfinity : 0.; });
  // What components lack that know of no way yet, one after the other.
  const auto shut_in = [&] { return team.sum(n, [&](int64_t i) { return rise[i] < kInfinity ? 0. : lack[i]; }); };
  constexpr int kEdges = 3;  // of a way; longer ones are begun, if they are not the only ones
  double before = kInfinity, left = shut_in();
  for (int edge = 0; edge < kEdges || (left > 0 && left < before); ++edge) {
    team.each(m, [&](int64_t j) {
      price[j] = t.b[j] > 0 ? e.tau[j] + (of_column[j] < 0 ? 0. : rise[of_column[j]]) : kInfinity;
    });
    team.columns(n, m, [&](int64_t i, const auto& lanes) {
      const int32_t own = of_row[i];
      if (!(lack[own] > little)) return;
      const double nearest = lanes.largest(m, [&](int64_t j) {
        return of_column[j] == own ? -kInfinity : alpha[i] - (cost_at(t.cost, i, j) - s.shift) - price[j];
      });
      lanes.once([&] { short_of[i] = -nearest; });
    });
    team.once([&] {
      for (int64_t i = 0; i < n; ++i) {
        const int32_t own = of_row[i];
        if (lack[own] > little && short_of[i] < rise[own]) rise[own] = short_of[i];
      }
    });
    before = left, left = shut_in();
  }
  constexpr double kRounding = 1e-10;  // of sums of weights, relative to the mass
  if (left > (t.tol > kRounding ? t.tol : kRounding) * s.mass) return Rise::endless;
  const auto rises = [&](int64_t i) { return lack[of_row[i]] > little && rise[of_row[i]] < kInfinity; };
  team.each(n, [&](int64_t i) { step[i] = rises(i) ? rise[of_row[i]] + reg * lack[of_row[i]] : 0.; });
  return team.sum(n, [&](int64_t i) { return rises(i) ? 1. : 0.; }) > 0 ? Rise::some : Rise::none;
}

}  // namespace
}  // namespace gradops
