// hessian_update: H <- n / n' H + 2 / n' X^T X,                   n' = n + tokens (symmetric: half is computed)
// gptaq_cross:    D <- n / n' D + 2 / n' (X_fp - X_q)^T X_q       (the difference is made before any rounding)
//
// Torch-free interface. X has one row per token, contiguous; a mask says which tokens count.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct HessianTask {  // a batch of items, each with its own H, X and count
  const void* x;      // batch x tokens x n
  const void* x_q;    // null: H; else D, and x is X_fp
  Element element;
  const bool* mask;       // batch x tokens, or null: all
  const int64_t* n_seen;  // tokens in H so far, per item
  int64_t* n_new;         // and after the call
  void* h;                // batch x n x n; H: only the part on and below the diagonal is read
  Element h_element;      // f32 or f64; f64 if `element` is
  int64_t batch, tokens, n;
  bool split;  // f32 and f16 may be multiplied as the sum of two bf16, where that is faster
};

// One item: h <- beta h + scale (x - x_q)^T x_q, or beta h + scale x^T x.
struct ProductTask {
  const char *x, *x_q;
  Element element, h_element;
  const int64_t* rows;  // which rows of x: tokens of them, or null: the first ones
  int64_t tokens, n;
  char* h;
  double beta, scale;
  bool symmetric() const { return !x_q; }
  int64_t row(int64_t t) const { return rows ? rows[t] : t; }
};

// The work is a sequence of phases; the units of a phase are independent of each other, so they may
// be run in any order, on any thread, in ranges of any size, with the same bits as result.
struct ProductEngine {
  int64_t (*workspace_bytes)(const ProductTask&);  // shared by all phases, 4096-aligned
  int64_t (*scratch_bytes)(const ProductTask&);    // of the calling thread
  int (*phases)(const ProductTask&);
  int64_t (*units)(const ProductTask&, int phase);
  void (*run)(const ProductTask&, char* workspace, char* scratch, int phase, int64_t begin, int64_t end);
};
// Sums of 256 tokens in float (f64 input: double), then in the type of h.
GRADOPS_DECLARE(const ProductEngine&, hessian_update_full, Element element, Element h_element)
// Products of bf16: one of bf16 input, three (two of D) of f32 and f16 input or of differences.
GRADOPS_DECLARE_BF16(const ProductEngine&, hessian_update_bf16, Element element, Element h_element, bool symmetric)

namespace cpu {
void hessian_update(const HessianTask&, void* workspace, void* = nullptr);
int64_t hessian_update_workspace(const HessianTask&);  // bytes
}  // namespace cpu
namespace cuda {
void hessian_update(const HessianTask&, void* workspace, void* stream);
int64_t hessian_update_workspace(const HessianTask&);
}  // namespace cuda
}  // namespace gradops
