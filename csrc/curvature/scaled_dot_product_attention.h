// scaled_dot_product_attention: o = softmax(scale q k^T + mask) v, its gradient, and the changes of both, tile by tile:
// nothing of queries x keys is ever stored. Torch-free interface.
//
// With S = scale q k^T + mask, L its rows' logsumexp, P = e^(S - L) and a dot for a change:
//   jvp           mu = rows of P S. summed = L.          o. = P v. + (P S.) v - mu o
//   backward      D = rows of g o summed                 dS = P (g v^T - D)
//                 dq = scale dS k, dk = scale dS^T q, dv = P^T g
//   backward_jvp  P. = P (S. - mu), D. = rows of g. o + g o. summed
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

// Inner loops on the CPU. Forward and jvp: tasks are blocks of queries, attention_query_blocks of them for each head.
// Backward: of one round, a task is a range of queries against a range of keys, for all the query heads of a key head.
// No two tasks of a round add to the same sum, and rounds follow each other, so every sum has one order.
struct AttentionSums {  // in float, or double; rows of d or dv numbers rounded up to vectors; null: not wanted
  void *dq, *dk, *dv, *dq_dot, *dk_dot, *dv_dot;
};
struct AttentionRound {
  int64_t rows;          // of a range of queries, and of one of keys
  int64_t first, count;  // ranges of queries that have a task
  int64_t shift, wrap;   // query range i meets key range (i + shift) % wrap
};
GRADOPS_DECLARE(void, attention_forward_blocks, const AttentionTask&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, attention_jvp_blocks, const AttentionTask&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, attention_backward_ranges, const AttentionTask&, const AttentionSums&, const AttentionRound&,
                int64_t begin, int64_t end)
// Rows of sums, as wide as `columns` rounded up, to an output.
GRADOPS_DECLARE(void, attention_narrow, Element, const void* sums, void* out, int64_t columns, int64_t begin,
                int64_t end)
GRADOPS_DECLARE(int64_t, attention_padded, Element, int64_t columns)  // columns rounded up to vectors
constexpr int64_t attention_query_block(Element e) { return e == Element::f64 ? 32 : 64; }

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
