// permutation_weights: within each group of answers, the softmax of the answers' mean log-likelihoods over tau.
// Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct PermutationWeights {
  const void* logp;           // tokens
  const int64_t* cu_seqlens;  // answers + 1
  const int64_t* offsets;     // groups + 1
  void* weights;              // answers; double if `element` is f64, else float
  double* means;              // answers: workspace
  Element element;
  int64_t tokens, answers, groups;
  double tau;
};

GRADOPS_DECLARE(void, permutation_weights_groups, const PermutationWeights&, int64_t begin, int64_t end)

namespace cpu {
void permutation_weights(const PermutationWeights&, void* = nullptr);  // throws std::invalid_argument: bad offsets
}
namespace cuda {
void permutation_weights(const PermutationWeights&, void* stream);
}
}  // namespace gradops
