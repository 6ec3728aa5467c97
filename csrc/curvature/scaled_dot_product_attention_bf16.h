// Attention of bf16 by products of bf16 with sums in float: forward and backward, without changes of them.
#pragma once
#include "curvature/scaled_dot_product_attention.h"

namespace gradops {

struct AttentionPass {  // units, independent of each other
  int64_t (*units)(const AttentionTask&);
  int64_t (*scratch)(const AttentionTask&);  // bytes of the calling thread
  void (*run)(const AttentionTask&, char* workspace, char* scratch, int64_t begin, int64_t end);
};
struct AttentionEngine {
  AttentionPass forward, backward, finish;          // finish: dq, after backward
  int64_t (*workspace)(const AttentionTask& task);  // bytes, of backward and finish
};
GRADOPS_DECLARE_BF16(const AttentionEngine&, attention_bf16)

}  // namespace gradops
