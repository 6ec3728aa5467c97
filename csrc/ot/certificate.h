// certificate.h: how good a plan is, proved. The plan is rounded onto both marginals (Altschuler, Weed and Rigollet
// 2017, Algorithm 2: shrink rows, shrink columns, fill what is missing), the fill by the north-west rule, so that it
// has at most n + m - 1 entries. The rounded plan's value bounds the optimum from above, D from below.
// For any Team; local to the includer.
#pragma once
#include "ot/evaluate.h"

namespace gradops {
namespace {

struct Certificate {
  double primal;  // of the rounded plan, shifted costs
  double gap;     // (primal - D) / primal
};

// What one more entry q of row i and column j adds to the value.
template <class State>
GRADOPS_TEAM double fill_value(const Transport& t, const State& s, const Evaluation& e, const double* row_factor,
                               const double* column_factor, int64_t i, int64_t j, double q) {
  const int64_t at = j * t.capacity, place = place_of(e.support + at, e.count[j], i);
  const double before = place < 0 ? 0. : e.weight[at + place] * row_factor[i] * column_factor[j];
  return q * (cost_at(t.cost, i, j) - s.shift) + .5 * t.reg * q * (2 * before + q);
}

// One thread. Where a masked cost is in the way the next column with mass left is tried; what a mask leaves over in the
// end counts at twice the spread of costs and the largest sum of potentials: D counts it at less.
GRADOPS_TEAM double fill_corners(const Transport& t, const TransportState& s, const Evaluation& e,
                                 const double* row_factor, const double* column_factor, double* rows, double* columns,
                                 double far) {
  const int64_t n = t.cost.n, m = t.cost.m;
  double value = 0;
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    while (first < m && !(columns[first] > 0)) ++first;
    for (int64_t j = first; j < m && rows[i] > 0; ++j) {
      if (!(columns[j] > 0) || !(cost_at(t.cost, i, j) < kInfinity)) continue;
      const double q = rows[i] < columns[j] ? rows[i] : columns[j];
      value += fill_value(t, s, e, row_factor, column_factor, i, j, q);
      rows[i] = rows[i] <= q ? 0 : rows[i] - q;
      columns[j] = columns[j] <= q ? 0 : columns[j] - q;
    }
    if (rows[i] > 0) value += rows[i] * far;
  }
  return value;
}

// Uses the vectors rows[6..7], columns[0..1].
template <class Team>
GRADOPS_TEAM Certificate certify(Team& team, const Transport& t, const TransportState& s, const double* alpha,
                                 const Evaluation& e) {
  const int64_t n = t.cost.n, m = t.cost.m;
  double *row_factor = s.rows[6], *row_rest = s.rows[7], *column_factor = s.columns[0], *column_rest = s.columns[1];
  team.each(n, [&](int64_t i) {
    const double sum = t.a[i] - e.grad[i];
    row_factor[i] = sum > t.a[i] ? t.a[i] / sum : 1;
  });
  const auto shrunk = [&](int64_t j, const auto& lanes) {
    const double* weight = e.weight + j * t.capacity;
    const int32_t* row = e.support + j * t.capacity;
    const double sum = lanes.sum(e.count[j], [&](int64_t k) { return weight[k] * row_factor[row[k]]; });
    lanes.once([&] {
      column_factor[j] = sum > t.b[j] ? t.b[j] / sum : 1;
      column_rest[j] = t.b[j] > sum ? t.b[j] - sum : 0;
    });
    lanes.wait();
  };
  scatter(
      team, t, s, e.work,
      [&](int64_t j, const auto& lanes, double* sum) {
        shrunk(j, lanes);
        const double *weight = e.weight + j * t.capacity, factor = column_factor[j];
        const int32_t* row = e.support + j * t.capacity;
        lanes.add_at(e.count[j], row, [&](int64_t k) { return weight[k] * row_factor[row[k]] * factor; }, sum);
        lanes.wait();
      },
      [&](int64_t i, double sum) { return t.a[i] > sum ? t.a[i] - sum : 0.; }, row_rest);
  // On its support alpha_i - c_ij = tau_j + reg t_ij: costs are read from the lists, not gathered again.
  double* value = s.columns[2];
  team.columns(m, s.list_work, [&](int64_t j, const auto& lanes) {
    const int64_t at = j * t.capacity;
    const double factor = column_factor[j];
    const double sum = lanes.sum(e.count[j], [&](int64_t k) {
      const int32_t i = e.support[at + k];
      const double r = e.weight[at + k] * row_factor[i] * factor;
      return r * (cost_at(t.cost, i, j) - s.shift + .5 * t.reg * r);
    });
    lanes.once([&] { value[j] = sum; });
  });
  double primal = team.sum(m, [&](int64_t j) { return value[j]; });
  const double top = team.largest(n, [&](int64_t i) { return t.a[i] > 0 ? alpha[i] : -kInfinity; });
  const double most = team.largest(m, [&](int64_t j) { return t.b[j] > 0 ? -e.tau[j] : -kInfinity; });  // of beta
  team.once([&] {
    value[0] = fill_corners(t, s, e, row_factor, column_factor, row_rest, column_rest, 2 * (s.spread + top + most));
  });
  primal += value[0];
  return {primal, primal > 0 ? (primal - e.value) / primal : 0.};
}

}  // namespace
}  // namespace gradops
