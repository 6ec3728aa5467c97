// laplacian.h: reg times minus the Hessian of D, the Laplacian of a graph: sum_j diag(s_j) - s_j s_j' / |S_j|, where
// s_j marks the support S_j of column j. And conjugate gradients for it. Written for any Team; local to the includer.
#pragma once
#include "ot/evaluate.h"

namespace gradops {
namespace {

// out = (L + lam) v
template <class Team>
GRADOPS_TEAM void laplacian_apply(Team& team, const Transport& t, const TransportState& s, const Evaluation& e,
                                  double lam, const double* v, double* out) {
  scatter(
      team, t, s, e.work,
      [&](int64_t j, const auto& lanes, double* sum) {
        const int32_t* row = e.support + j * t.capacity;
        const int64_t count = e.count[j];
        if (count == 0) return;
        const double mean = lanes.sum_at(count, v, row) / double(count);
        lanes.add_at(count, row, [&](int64_t) { return mean; }, sum);
        lanes.wait();
      },
      [&](int64_t i, double sum) { return (e.degree[i] + lam) * v[i] - sum; }, out);
}

struct CgVectors {
  double *rest, *scaled, *direction, *product;  // n each
};

// x with (L + lam) x = rhs to the relative tolerance rtol in the norm of the inverse diagonal; returns the products.
// apply(v, out): out = (L + lam) v, of a matrix with the diagonal `degree` + lam.
template <class Team, class Apply>
GRADOPS_TEAM int64_t conjugate_gradients(Team& team, int64_t n, const Apply& apply, const double* degree, double lam,
                                         const double* rhs, double rtol, int64_t most, const CgVectors& w, double* x) {
  const auto both = [&] { return team.sum(n, [&](int64_t i) { return w.rest[i] * w.scaled[i]; }); };
  team.each(n, [&](int64_t i) {
    x[i] = 0;
    w.rest[i] = rhs[i];
    w.scaled[i] = w.direction[i] = rhs[i] / (degree[i] + lam);
  });
  double size = both();
  const double stop = rtol * rtol * size;
  int64_t k = 0;
  while (k < most && size > stop) {
    apply(w.direction, w.product);
    ++k;
    const double curvature = team.sum(n, [&](int64_t i) { return w.direction[i] * w.product[i]; });
    if (!(curvature > 0)) break;
    const double step = size / curvature;
    team.each(n, [&](int64_t i) {
      x[i] += step * w.direction[i];
      w.rest[i] -= step * w.product[i];
      w.scaled[i] = w.rest[i] / (degree[i] + lam);
    });
    const double before = size;
    size = both();
    const double turn = size / before;
    team.each(n, [&](int64_t i) { w.direction[i] = w.scaled[i] + turn * w.direction[i]; });
  }
  return k;
}

}  // namespace
}  // namespace gradops
