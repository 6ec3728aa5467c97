// router: tokens to experts by optimal transport with at most k experts a token, or k tokens an expert: a fixed number
// of Adam steps on the semi-dual, for groups that know nothing of each other. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct RouterTask {
  const void* logits;  // groups x tokens x experts
  Element element;     // of logits and weights; plan is double for f64, else float
  int64_t groups, tokens, experts;
  bool experts_choose;
  int64_t width;     // slots: experts a token may have, or tokens an expert may have
  int64_t capacity;  // tokens choose: tokens an expert may have; negative: any number
  int64_t steps;
  double gamma, lr;
  // What comes out. Of the first three: groups x (tokens or experts) x width.
  int64_t* indices;                            // ascending; -1: unused
  void* weights;                               // softmax of the logits at the indices
  void* plan;                                  // the plan there
  int64_t *load, *taken, *overflow, *dropped;  // groups x experts, groups x tokens twice, groups
  double *residual, *value;                    // groups
};

// A group with a NaN or an infinite logit: no indices, NaN for its numbers.
// Bytes for one group on the CPU; numbers and vectors of at most 64 bytes
inline int64_t router_scratch(const RouterTask& t) {
  const int64_t padded = (t.tokens + 15) / 16 * 16, slots = t.experts_choose ? 0 : t.width;
  const int64_t numbers = 2 * padded * t.experts + 6 * padded + 22 * t.experts + 64 * slots;
  return (t.element == Element::f64 ? 8 : 4) * numbers + 1024;  // for alignment
}

GRADOPS_DECLARE(void, router_groups, const RouterTask&, int64_t begin, int64_t end, char* scratch)

namespace cpu {
void router(const RouterTask&, void* workspace, void* = nullptr);
inline int64_t router_workspace(const RouterTask&) { return 0; }
}  // namespace cpu
namespace cuda {
void router(const RouterTask&, void* workspace, void* stream);
int64_t router_workspace(const RouterTask&);  // bytes
}  // namespace cuda
}  // namespace gradops
