// Attention of bf16 by products of bf16 with sums in float: what needs no changes of the inputs.
#pragma once
#include "curvature/scaled_dot_product_attention.h"

namespace gradops {

struct AttentionPass {  // units, independent of each other
  int64_t (*units)(const AttentionTask&);
  int64_t (*scratch)(const AttentionTask&);  // bytes of the calling thread
  void (*run)(const AttentionTask&, char* workspace, char* scratch, int64_t begin, int64_t end);
};
struct AttentionGradient {
  AttentionPass parts, finish;  // one after the other
  int64_t (*workspace)(const AttentionTask&);
};
GRADOPS_DECLARE_BF16(const AttentionPass&, attention_forward_bf16)
GRADOPS_DECLARE_BF16(const AttentionGradient&, attention_backward_bf16)

}  // namespace gradops
