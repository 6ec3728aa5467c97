// newton_schulz: out = p(in / ||in||_F), where p is a chain of odd quintics
//
//   A = X X^T,   X <- a X + (b A + c A A) X      (X has at most as many rows as columns)
//
// Torch-free interface. Matrices are contiguous, row-major, rows x cols; tall ones are transposed
// on the way in and out, so the Gram matrix is always the small one.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct NewtonSchulzSteps {
  static constexpr int kMost = 32;
  double a[kMost], b[kMost], c[kMost];
  int steps = 0;
  // Above 1, the Gram form (CPU, full products): this many polynomials at a time are multiplied
  // together as functions of A, and then applied to X once. Fewer operations for elongated matrices.
  int restart = 0;
};

// From (a, b, c) per step, one after the other. Throws std::invalid_argument unless they are `count / 3`
// whole steps, at most kMost.
NewtonSchulzSteps newton_schulz_steps(const double* coefficients, int64_t count);

// How products are computed, and in what form iterates are stored.
enum class NewtonSchulzProducts : int {
  full,    // in float (double for f64 input)
  bf16x3,  // each number as a sum of two bf16, three products (two-part splitting)
  bf16,    // in bf16, sums in float
};

// One matrix.
struct NewtonSchulzTask {
  const void* in;
  void* out;
  Element element;
  int64_t rows, cols;
  const NewtonSchulzSteps* steps;
  bool normalize;  // divide by the Frobenius norm first (a zero matrix stays zero)
};

// One way of iterating a matrix. The work is a sequence of phases; the units of a phase are
// independent of each other, so they may be run in any order, on any thread, in ranges of any size,
// with the same bits as result. A phase starts when the one before it is complete.
struct NewtonSchulzEngine {
  int64_t (*workspace_bytes)(const NewtonSchulzTask&);  // shared by all phases of one matrix, 4096-aligned
  int (*phases)(const NewtonSchulzTask&);
  int64_t (*units)(const NewtonSchulzTask&, int phase);
  // scratch: scratch_bytes(task) bytes of the calling thread, contents undefined at entry
  void (*run)(const NewtonSchulzTask&, char* workspace, char* scratch, int phase, int64_t begin, int64_t end);
  int64_t (*scratch_bytes)(const NewtonSchulzTask&);
  // All phases on one thread, where that is less work than run() phase by phase; may be null.
  void (*run_all)(const NewtonSchulzTask&, char* workspace, char* scratch) = nullptr;
};
// f32, f64, and f16 and bf16 input widened to float.
GRADOPS_DECLARE(const NewtonSchulzEngine&, newton_schulz_full, Element element)
// bf16 and f32 input; parts = 1 (bf16) or 2 (bf16x3).
GRADOPS_DECLARE_BF16(const NewtonSchulzEngine&, newton_schulz_bf16, Element element, int parts)
// The same for parts = 1, where there is no tile unit.
GRADOPS_DECLARE_BF16(const NewtonSchulzEngine&, newton_schulz_pairs, Element element)

namespace cpu {
void newton_schulz(const void* in, void* out, Element element, int64_t batch, int64_t rows, int64_t cols,
                   const NewtonSchulzSteps& steps, bool normalize, NewtonSchulzProducts products, void* = nullptr);
}  // namespace cpu
namespace cuda {
// One launch for a batch of matrices with min(rows, cols) <= 256, on any GPU from sm_80 on.
// 16-bit input is multiplied on tensor cores in its own type, whatever `products`; f32 as it says.
bool newton_schulz_fits(Element element, int64_t rows, int64_t cols);
// Of the current device; 16-byte aligned, contents undefined before and after. 0 if X fits in shared memory.
int64_t newton_schulz_workspace_bytes(Element element, int64_t batch, int64_t rows, int64_t cols,
                                      NewtonSchulzProducts products);
void newton_schulz(const void* in, void* out, Element element, int64_t batch, int64_t rows, int64_t cols,
                   const NewtonSchulzSteps& steps, bool normalize, NewtonSchulzProducts products, void* workspace,
                   void* stream);
}  // namespace cuda
}  // namespace gradops
