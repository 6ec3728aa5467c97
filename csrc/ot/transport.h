// transport.h: one problem of sparse optimal transport, and what its solvers share.
//
//   min <T, C> + reg/2 |T|^2,  T >= 0,  T 1 = a,  T' 1 = b,  and if max_nz > 0 at most max_nz entries per column.
// Semi-dual: D(alpha) = <alpha, a> - sum_j omega_j(alpha - c_j), concave; its supergradient is a - T 1, where column j
// of T is ((alpha - c_j - tau_j)_+ / reg) with the threshold tau_j that makes it sum to b_j.
//
// Inside a solver costs are shifted by their minimum, and rows without mass have alpha = kNever: they enter no support.
#pragma once
#include <cstdint>

#include "ot/cost.h"
#include "ot/team.h"

namespace gradops {

enum class TransportStatus : int {
  converged,        // marginal error <= tol, and for max_nz = 0 the gap is small enough (ot/path_newton.h)
  iteration_limit,  // max_iter evaluations
  stalled,          // no step ascends any more: rounding
  stagnated,        // max_nz: the dual value stopped rising, the row marginals are not met
  infeasible,       // some rows or columns have more mass than finite costs let them pass on
  invalid,          // NaN, negative weights, or sums of a and b that differ
  overflow,         // a column has more candidates than capacity: a larger one is needed
};

struct TransportReport {  // all double, as the tensor that holds it
  double value;           // <R, C> + reg/2 |R|^2 of the plan R, rounded onto both marginals; infinity if there is none
  double dual_value;      // D(alpha): a lower bound of the optimum of max_nz = 0, up to rounding
  double gap;             // (value - dual_value) / (value with costs counted from their minimum): shifts change nothing
  double marginal_err;    // |T 1 - a|_1 / |a|_1
  double ties;            // columns whose max_nz-th and next value agree: D has a kink there
  double n_iter;          // evaluations
  double status;          // TransportStatus
  double newton, cg, scans, widest;  // steps, products with the Laplacian, columns scanned / m, widest support
};
constexpr int64_t kTransportReport = sizeof(TransportReport) / sizeof(double);

struct Transport {               // one problem
  Cost cost;                     // n x m
  const double *a, *b, *alpha0;  // n, m; n or null for a cold start
  double reg;
  int64_t max_nz;  // 0: as many as the solution has
  bool averaged;   // for max_nz > 0: the plan of the relaxation, which meets the rows, may have more entries
  double tol, gap_tol;
  int64_t max_iter, capacity;  // evaluations; candidates a column has room for
  double *alpha, *beta;        // out: n, m
  int64_t* index;              // out: m x width, rows of the plan's entries, ascending; 0 where unused
  double* weight;              // out: m x width; 0 where unused. Columns sum to b if report->widest <= width
  int64_t width;
  TransportReport* report;  // out
};

constexpr double kNever = -1e300;  // alpha of a row without mass
constexpr double kInfinity = __builtin_huge_val();
constexpr int kEpochs = 4;
constexpr double kMassTolerance = 1e-5;  // relative, between the sums of a and b; then b is scaled

// D and its supergradient at one alpha, and the plan there.
struct Evaluation {
  double value;      // with shifted costs
  double residual;   // |grad|_1
  int64_t work;      // about what a visit to a column's entries touches
  double* grad;      // n: a - T 1
  double* degree;    // n: how many supports the row is in
  double* tau;       // m
  int32_t* support;  // m x capacity: rows of column j's entries
  double* weight;    // m x capacity
  int32_t* count;    // m
};

// Per column the rows that can be in its support, so that an evaluation near the last ones reads no cost matrix.
// Outside of column j's list alpha_i - c_ij <= low_j at past alpha number epoch_j; so now it is <= low_j + the largest
// rise of alpha since then.
struct Candidates {
  int32_t* index;              // m x capacity
  double* cost;                // m x capacity, shifted
  int32_t *count, *epoch;      // m
  double* low;                 // m
  double* past;                // kEpochs x n: alpha at the last epochs; epoch e is in slot e % kEpochs
  double* rise;                // kEpochs: largest rise since then
  double *scan_low, *guess;    // m: for scans; thresholds of the last evaluation
  int32_t *scan_count, *mark;  // m: what a scan found; what a list needs (ot/candidates.h)
  int32_t newest;
};

// What one solver call owns besides the problem; laid out in one workspace by plan_state.
struct TransportState {
  double shift, mass, spread;  // minimum of the finite costs; sum of a; maximum - minimum
  Candidates lists;
  Evaluation now, trial;  // ping-pong
  double* scatter;        // pieces x 2n
  int64_t pieces, evaluations;
  int64_t list_work;         // about how long a list is
  double scanned;            // columns
  int64_t newton, products;  // steps tried, products with the Laplacian
  int32_t* component;        // n + m: ot/components.h
  double* rows[10];          // vectors of n for the algorithm
  double* columns[4];        // vectors of m; the last is b
};

namespace {

// Hands out a workspace in order; with a null base it only measures.
class Carve {
 public:
  GRADOPS_TEAM explicit Carve(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  GRADOPS_TEAM T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
  GRADOPS_TEAM int64_t bytes() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

GRADOPS_TEAM void plan_evaluation(Carve& carve, const Transport& t, Evaluation& e) {
  const int64_t n = t.cost.n, m = t.cost.m;
  e.grad = carve.take<double>(n);
  e.degree = carve.take<double>(n);
  e.tau = carve.take<double>(m);
  e.support = carve.take<int32_t>(m * t.capacity);
  e.weight = carve.take<double>(m * t.capacity);
  e.count = carve.take<int32_t>(m);
}
GRADOPS_TEAM void plan_state(Carve& carve, const Transport& t, int64_t pieces, TransportState& s) {
  const int64_t n = t.cost.n, m = t.cost.m;
  Candidates& c = s.lists;
  c.index = carve.take<int32_t>(m * t.capacity);
  c.cost = carve.take<double>(m * t.capacity);
  c.count = carve.take<int32_t>(m);
  c.epoch = carve.take<int32_t>(m);
  c.low = carve.take<double>(m);
  c.past = carve.take<double>(kEpochs * n);
  c.rise = carve.take<double>(kEpochs);
  c.scan_low = carve.take<double>(m);
  c.guess = carve.take<double>(m);
  c.scan_count = carve.take<int32_t>(m);
  c.mark = carve.take<int32_t>(m);
  plan_evaluation(carve, t, s.now);
  plan_evaluation(carve, t, s.trial);
  s.pieces = pieces;
  s.scatter = carve.take<double>(pieces * 2 * n);
  s.component = carve.take<int32_t>(n + m);
  for (double*& row : s.rows) row = carve.take<double>(n);
  for (double*& column : s.columns) column = carve.take<double>(m);
}

}  // namespace

// What an algorithm is made of, as templates over Team:
//   begin, start_alpha, unreachable, row_update, finish, give_up   ot/frame.h
//   evaluate      value, grad, tau and the plan at alpha           ot/evaluate.h
//   laplacian_apply, conjugate_gradients                           ot/laplacian.h
//   raise_components                                               ot/components.h
//   certify                                                        ot/certificate.h
// Two evaluations may be kept, s.now and s.trial; more need memory of their own (plan_evaluation).

}  // namespace gradops
