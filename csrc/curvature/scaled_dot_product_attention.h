// scaled_dot_product_attention: o = softmax(scale q k^T + mask) v, its gradient, and the changes of both, tile by tile:
// nothing of queries x keys is ever stored. Torch-free interface.
//
// With S = scale q k^T + mask, L its rows' logsumexp, P = e^(S - L) and a dot for a change:
//   jvp           mu = rows of P S. summed = L.          o. = P v. + (P S.) v - mu o
//   backward      D = rows of g o summed                 dS = P (g v^T - D), dq = scale dS k, dk = scale dS^T q, dv =
//   P^T g backward_jvp  P. = P (S. - mu), D. = rows of g. o + g o. summed
//                 dS. = P. (g v^T - D) + P (g. v^T + g v.^T - D.), and so on by the product rule
// A row that sees no key has o = 0 and L = -inf, and no gradient.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

// One matrix for each head: (batch, head, row, column) is data[batch * b + head * h + row * r + column], in elements.
struct HeadRows {
  const void* data;  // null: not given; a change is then zero
  int64_t b, h, r;
};

// Of a mask, (batch, head, query, key) is data[batch * b + head * h + query * q + key * k]; steps may be 0.
struct AttentionMask {
  const void* data;  // null: every key is seen
  bool boolean;      // bytes, not 0: seen. Otherwise numbers as wide as those of q, added to S
  int64_t b, h, q, k;
};

struct AttentionTask {
  int64_t batch, heads, key_heads;  // query head i reads key head i / (heads / key_heads)
  int64_t queries, keys, d, dv;     // d: columns of q and k; dv: of v and o
  double scale;
  bool causal;  // query i sees keys 0 to i
  Element element;
  AttentionMask mask;
  HeadRows q, k, v, q_dot, k_dot, v_dot, g, g_dot;
  // The rest is contiguous: batch x heads x rows (x columns). lse and mu are float64 where q is, float32 elsewhere.
  void *o, *lse, *o_dot, *mu;                      // written by forward and jvp, read by backward
  void *dq, *dk, *dv_, *dq_dot, *dk_dot, *dv_dot;  // of backward; null: not wanted
};

namespace cpu {
void attention_forward(const AttentionTask&, void* workspace, void* = nullptr);   // o, lse; with o_dot also o_dot, mu
void attention_jvp(const AttentionTask&, void* workspace, void* = nullptr);       // o_dot, mu from o, lse
void attention_backward(const AttentionTask&, void* workspace, void* = nullptr);  // gradients, changes of them, or both
int64_t attention_workspace(const AttentionTask&);                                // bytes, for any of the three
}  // namespace cpu
namespace cuda {
void attention_forward(const AttentionTask&, void* workspace, void* stream);
void attention_jvp(const AttentionTask&, void* workspace, void* stream);
void attention_backward(const AttentionTask&, void* workspace, void* stream);
int64_t attention_workspace(const AttentionTask&);
}  // namespace cuda
}  // namespace gradops
