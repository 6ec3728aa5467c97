// capo_curvature: per token, with v = e_a - p on its support of `k` tokens, u = G h for the direction G that an
// optimizer takes from the last layer's gradient A v h',
//   grad_dot = A v'u, hess = A ((v'u)^2 - sum p u^2 + (sum p u)^2), fisher = (v'u)^2.
// SGD has G = A v h', so u = A |h|^2 v. Adam divides by root mean squares, row by row of the vocabulary. Torch-free.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct CapoTokens {       // contiguous; "real" is double if `element` is f64, else float
  const void* hidden;     // tokens x h
  const void* probs;      // tokens x k, real
  const int64_t* action;  // tokens; negative: not in the support
  const void* advantage;  // tokens, real
  Element element;
  int64_t tokens, k, h;
};
struct CapoAdam {
  const int64_t* rows;            // tokens x k: into the moments; null for SGD
  const void *average, *squares;  // count x h, real
  int64_t count;
  // the moments' part and the gradient's part of the new averages, bias corrections included
  double old1, new1, old2, new2, eps;
};
struct CapoMoments {  // tokens each, real: of the full softmax
  const void *logp, *sum_p2, *sum_p3;
};
struct CapoResults {  // tokens each, real
  void *grad_dot, *hess, *fisher;
};

// `scratch`: h reals, for a hidden state widened to real
GRADOPS_DECLARE(void, capo_curvature_tokens, const CapoTokens&, const CapoAdam&, const CapoResults&, int64_t begin,
                int64_t end, void* scratch)
GRADOPS_DECLARE(void, capo_curvature_closed, const CapoTokens&, const CapoMoments&, const CapoResults&, int64_t begin,
                int64_t end)

namespace cpu {
// Throws std::invalid_argument for an action or a row that is not there.
void capo_curvature(const CapoTokens&, const CapoAdam&, const CapoResults&, void* = nullptr);
void capo_curvature_sgd(const CapoTokens&, const CapoMoments&, const CapoResults&, void* = nullptr);
}  // namespace cpu
namespace cuda {
void capo_curvature(const CapoTokens&, const CapoAdam&, const CapoResults&, void* stream);
void capo_curvature_sgd(const CapoTokens&, const CapoMoments&, const CapoResults&, void* stream);
}  // namespace cuda
}  // namespace gradops
