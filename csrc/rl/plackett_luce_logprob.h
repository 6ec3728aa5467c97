// plackett_luce_logprob: log p(z) = sum_i [s(z_i) - log sum_{j not in z_1..z_{i-1}} exp s(j)] of rankings, and its
// gradient
//   d/ds(j) = 1[j in z] - sum_{i <= place of j} exp(s(j) - L_i),  L_i the i-th logarithm.
// With m_i the largest score still there at place i and r_i = sum exp(s - m_i), L_i = m_i + log r_i, backwards
//   r_i = r_{i+1} exp(m_{i+1} - m_i) + exp(s(z_i) - m_i),
// and forwards the gradient's sum is exp(s(j) - m_p) q_p / r_p, p the place of j (the last one if j is not ranked),
//   q_p = q_{p-1} exp(m_p - m_{p-1}) r_p / r_{p-1} + 1.
// No exponent is positive. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct PlackettLuce {
  const void* scores;          // rows x n, float or double
  const int64_t* permutation;  // rows x k; a negative entry ends the ranking
  void* out;                   // rows (log-probabilities) or rows x n (gradients)
  Element element;
  int64_t rows, n, k;
  bool gradient;
};

// Returns the first row whose permutation is none, else -1. `scratch`: plackett_luce_scratch bytes.
GRADOPS_DECLARE(int64_t, plackett_luce_rows, const PlackettLuce&, int64_t begin, int64_t end, void* scratch)
inline int64_t plackett_luce_scratch(const PlackettLuce& t) { return 8 * (6 * (t.k + 16) + 2 * (t.n + 16)); }

namespace cpu {
void plackett_luce(const PlackettLuce&, void* workspace, void* = nullptr);  // throws std::invalid_argument
inline int64_t plackett_luce_workspace(const PlackettLuce&) { return 0; }
}  // namespace cpu
namespace cuda {
void plackett_luce(const PlackettLuce&, void* workspace, void* stream);
int64_t plackett_luce_workspace(const PlackettLuce&);  // bytes
}  // namespace cuda
}  // namespace gradops
