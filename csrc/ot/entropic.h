// entropic: min <T, C> + reg sum t (log t - 1) over the plans of a batch of transport problems, by Sinkhorn's
// iterations. Torch-free interface.
//
// Potentials are kept in double and in units of reg / log2(e): t_ij = 2^(f_i + g_j - scale c_ij). With s_ij the plan
// at the potentials known so far, one iteration is
//   r_i = sum_j s_ij,          f_i += log2(a_i / r_i),
//   q_j = sum_i s_ij a_i/r_i,  g_j += log2(b_j / q_j):
// the iterates of the log-domain algorithm. On the CPU the plan of an earlier iteration, with its rows' sums about 1,
// is kept as a kernel, of which s_ij are multiples by a factor per row and column: an iteration is a multiplication by
// it and by its transpose, in one read, as a group of rows is still in the cache when its factors are known. Where a
// factor leaves the range of float, or a sum that of its terms, the kernel or the row is made again, at one exponential
// per entry; of a problem too large to keep it, in every iteration. The potentials of the last iteration are the shift
// that keeps the exponentials in range; sums that say otherwise are made again with the largest exponent as the shift.
// Entries are float while the plan is far from its marginals, and double at the end.
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
constexpr double kEntropicRounding = 1e-15;  // of a row's mass: what it may seem to lack when it lacks nothing

struct EntropicItem {  // one problem
  Cost cost;           // with n and m as they lie in memory
  int64_t rows, columns;
  const void* y_transposed;  // of points: (d, columns), in the arithmetic of the call
  double scale;
  const double *a, *b;
  double *f, *g;
};

// Of the kernel: k_ij = 2^(f_i - log2 a_i + g_j - scale c_ij), with the potentials that an earlier iteration found.
// Those of now differ from them by the scalings u_i = 2^(f now - f) and v_j = 2^(g now - g), so that
// r_i / a_i = u_i sum_j k_ij v_j.
struct EntropicBase {
  double *f, *g;
  float *g_high, *g_low;  // g = g_high + g_low, g_high a multiple of grid; float arithmetic only
  void* v;                // in the arithmetic of the pass; 0 up to entropic_stride() and where b_j is
  double grid, v_sum;
};
struct EntropicPass {
  const EntropicItem* item;
  EntropicBase* base;
  void* kernel;  // (rows, entropic_stride(columns)) in the arithmetic of the pass; null: not kept, and always fresh
  bool in_double, fresh;  // fresh: the base is new, and the kernel is to be made
  double omega;           // over-relaxation of the step, 1 for none
};
struct EntropicOutcome {
  double error, span, weight;  // sum_i |r_i - a_i| before the step; the largest |f_i| after it; sum_i a_i u_i
  bool infeasible;             // some row has mass and no finite cost
};
struct EntropicStep {
  double error, drift;  // sum_j |q_j - b_j|; the largest |log2 v_j|
  int64_t doubtful;     // columns whose sums were not trusted: made -1, and g_j left alone
};
struct EntropicKept {  // the plan at the end, where there is memory for it
  double* plan;        // (rows, entropic_stride(columns)), or null
  const double* v;     // not null: for now `plan` is a kernel, and t_ij = x_i k_ij v_j
};
struct EntropicRounding {  // of the plan to its marginals: t_ij x_i y_j + e_i h_j / total
  const double *x, *y, *h;
  double total;
};

// A base of the potentials of now, and v = 1. `span`: the largest |f_i|, which the grid fits as well.
GRADOPS_DECLARE(void, entropic_base, const EntropicItem&, bool in_double, double span, EntropicBase&)
// Rows [begin, end): the step in f, and their part of q_j / v_j in `sums`, of entropic_stride(columns) numbers. begin
// is a multiple of kEntropicStep, and so are the rows of the kernel. scratch: entropic_scratch() bytes.
GRADOPS_DECLARE(EntropicOutcome, entropic_pass, const EntropicPass&, int64_t begin, int64_t end, void* scratch,
                double* sums)
// q_j of columns [begin, end) as largest exponent and sum of the others' powers: log2 q_j = top_j + log2(sums_j)
GRADOPS_DECLARE(void, entropic_columns, const EntropicItem&, int64_t begin, int64_t end, void* scratch, double* top,
                double* sums)
// g_j += omega log2(b_j / q_j), and v_j, from the sums, which become q_j. weight: of all rows.
GRADOPS_DECLARE(EntropicStep, entropic_step, const EntropicPass&, double weight, double* sums)
// Sums of rows [begin, end), x_i = min(1, a_i / r_i), their parts of the column sums of T and of diag(x) T; and the
// rows of the plan that is kept. If `v` is given, x holds the kernel's factors before.
GRADOPS_DECLARE(void, entropic_measure, const EntropicItem&, const EntropicKept&, int64_t begin, int64_t end,
                void* scratch, double* rows, double* x, double* columns, double* scaled)
// The part of rows [begin, end) in KL(rounded plan, T); after entropic_measure
GRADOPS_DECLARE(double, entropic_gap, const EntropicItem&, const EntropicKept&, const EntropicRounding&, int64_t begin,
                int64_t end, void* scratch)

constexpr int64_t kEntropicStep = 16, kEntropicRows = 64, kEntropicBlock = 32768;
inline int64_t entropic_stride(int64_t columns) { return (columns + 15) / 16 * 16; }
// Rows that are summed one way and the other before the next ones: what fits the L1 cache, if that is enough
inline int64_t entropic_group(int64_t stride, int64_t size) {
  const int64_t fit = kEntropicBlock / ((stride > 0 ? stride : 1) * size) / kEntropicStep * kEntropicStep;
  return fit < kEntropicStep ? kEntropicStep : fit < kEntropicRows ? fit : kEntropicRows;
}
inline int64_t entropic_scratch(int64_t columns) {
  const int64_t stride = entropic_stride(columns), rows = 8 * kEntropicStep * stride;
  return (rows > kEntropicBlock ? rows : kEntropicBlock) + 8 * 3 * stride;
}

namespace cpu {
void entropic(const EntropicTask&, void* workspace, void* = nullptr);
int64_t entropic_workspace(const EntropicTask&);  // bytes
}  // namespace cpu
namespace cuda {
void entropic(const EntropicTask&, void* workspace, void* stream);
int64_t entropic_workspace(const EntropicTask&);
}  // namespace cuda
}  // namespace gradops
