// plan_vjp: how a quadratically regularised plan answers to a change of costs and weights while its support stays. On
// the support, c_ij + reg t_ij = alpha_i + beta_j, and T has the row sums a and the column sums b: linear equations,
// whose matrix is the Laplacian of the graph with an edge for every entry. The op solves, for numbers g on the support,
//   sum_j (u_i + v_j) = sum_j g_ij + p_i   (rows),   sum_i (u_i + v_j) = sum_i g_ij + q_j   (columns),
// and gives r_ij = g_ij - u_i - v_j there, u and v. With p = q = 0, r is the projection of g on what leaves both
// marginals alone. A linear map, and its own transpose up to the signs of u, v, p and q: one op is vjp and jvp.
// In a connected component of the graph u + c, v - c will do too: u is centred there, and a part of p and q that moves
// mass from one component to another, which no plan on this support can follow, is left out. Torch-free.
#pragma once
#include <cstdint>

namespace gradops {

struct PlanVjpTask {     // contiguous
  const int64_t* index;  // batch x m x width: rows, distinct within a column
  const double* value;   // batch x m x width: entries > 0 are the support; a NaN makes its item NaN
  const double* g;       // batch x m x width
  const double *p, *q;   // batch x n, batch x m
  double* r;             // batch x m x width, 0 outside the support
  double *u, *v;         // batch x n, batch x m; 0 where a row or a column is empty
  int64_t batch, n, m, width;
};

namespace cpu {
void plan_vjp(const PlanVjpTask&);  // throws std::invalid_argument if a row of the support is not in [0, n)
}
}  // namespace gradops
