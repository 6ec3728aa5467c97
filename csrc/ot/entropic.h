// entropic: min <T, C> + reg sum t (log t - 1) over the plans of a batch of transport problems, by Sinkhorn's
// iterations. Torch-free interface.
//
// Potentials are kept in double and in units of reg / log2(e): t_ij = 2^(f_i + g_j - scale c_ij). With s_ij the plan
// at the potentials known so far, one iteration is
//   r_i = sum_j s_ij,          f_i += log2(a_i / r_i),
//   q_j = sum_i s_ij a_i/r_i,  g_j += log2(b_j / q_j):
// the iterates of the log-domain algorithm, at one exponential and one read per entry. The potentials of the last
// iteration are the shift that keeps the exponentials in range; sums that say otherwise are made again with the largest
// exponent as the shift. Exponentials are float while the plan is far from its marginals, and double at the end.
#pragma once
#include <cstdint>

#include "common/isa.h"
#include "ot/cost.h"

namespace gradops {

enum class EntropicStatus : int { converged = 0, iteration_limit = 1, infeasible = 4, invalid = 5 };  // as of solve

struct EntropicTask {
  const void* matrix;  // (batch, n, m), or null and points x (batch, n, d), y (batch, m, d)
  const void *x, *y;
  Element element;
  int64_t batch, n, m, d;
  const int64_t *n_len, *m_len;  // (batch): rows and columns in use; or null
  const double *a, *b;           // (batch, n), (batch, m), of one sum per problem
  const double* alpha0;          // (batch, n), or null
  double reg, tol;
  int64_t max_iter;
  double *alpha, *beta;  // out: (batch, n), (batch, m); -infinity where there is no mass
  double* report;        // out: (batch, kEntropicReport)
};
// dual value; KL(R, T) / mass with R the plan rounded to its marginals, so that <R, C> + reg sum r (log r - 1) is the
// dual value + reg KL(R, T); (|T 1 - a|_1 + |T' 1 - b|_1) / mass; iterations; EntropicStatus
constexpr int64_t kEntropicReport = 5;

struct EntropicItem {  // one problem
  Cost cost;           // with n and m as they lie in memory
  int64_t rows, columns;
  const void* y_transposed;  // of points: (d, columns), in the arithmetic of the call
  double scale;
  const double *a, *b;
  double *f, *g;
};

struct EntropicPass {
  const EntropicItem* item;
  bool in_double;
  const float *g_high, *g_low;  // g = g_high + g_low, g_high a multiple of grid; float arithmetic only
  double grid, omega;           // omega: over-relaxation of the step, 1 for none
};
struct EntropicOutcome {
  double error, span;  // sum_i |r_i - a_i| before the step; the largest |f_i| after it
  bool infeasible;     // some row has mass and no finite cost
};
struct EntropicStep {
  double error;      // sum_j |q_j - b_j|
  int64_t doubtful;  // columns whose sums were not trusted, and whose g_j was left alone
};
struct EntropicRounding {  // of the plan to its marginals: t_ij x_i y_j + e_i h_j / total
  const double *x, *y, *h;
  double total;
};

// Rows [begin, end): the step in f, and their part of q in `sums`. scratch: entropic_scratch() bytes.
GRADOPS_DECLARE(EntropicOutcome, entropic_pass, const EntropicPass&, int64_t begin, int64_t end, void* scratch,
                double* sums)
// q_j of columns [begin, end) as largest exponent and sum of the others' powers: log2 q_j = top_j + log2(sums_j)
GRADOPS_DECLARE(void, entropic_columns, const EntropicItem&, int64_t begin, int64_t end, void* scratch, double* top,
                double* sums)
// g_j += omega log2(b_j / sums_j), but for sums below `least`, which are not to be trusted
GRADOPS_DECLARE(EntropicStep, entropic_step, const EntropicItem&, double omega, double least, const double* sums)
// The parts of g for float arithmetic, on a grid that potentials as large as `span` fit as well; returns the grid
GRADOPS_DECLARE(double, entropic_split, const EntropicItem&, double span, float* g_high, float* g_low)
// Sums of rows [begin, end), x_i = min(1, a_i / r_i), their parts of the column sums of T and of diag(x) T
GRADOPS_DECLARE(void, entropic_measure, const EntropicItem&, int64_t begin, int64_t end, void* scratch, double* rows,
                double* x, double* columns, double* scaled)
// The part of rows [begin, end) in KL(rounded plan, T)
GRADOPS_DECLARE(double, entropic_gap, const EntropicItem&, const EntropicRounding&, int64_t begin, int64_t end,
                void* scratch)

constexpr int64_t kEntropicGroup = 8;  // rows whose plan entries are kept until the columns are added
inline int64_t entropic_scratch(int64_t columns) { return 8 * (kEntropicGroup + 2) * (columns + 16); }

namespace cpu {
void entropic(const EntropicTask&, void* workspace, void* = nullptr);
int64_t entropic_workspace(const EntropicTask&);  // bytes
}  // namespace cpu
namespace cuda {
void entropic(const EntropicTask&, void* workspace, void* stream);
int64_t entropic_workspace(const EntropicTask&);
}  // namespace cuda
}  // namespace gradops
