// attention_scores.cuh: which keys a query sees, and with what score.
#pragma once
#include "common/device_number.cuh"
#include "common/value_error.h"
#include "curvature/attention_tiles.cuh"
#include "curvature/scaled_dot_product_attention.h"

namespace gradops {
namespace {

template <class T>  // columns from `column` on
__device__ Source<T> source(const HeadRows& m, int64_t batch, int64_t head, int64_t rows, int64_t cols,
                            int64_t column = 0) {
  const T* data = static_cast<const T*>(m.data);
  if (data) data += batch * m.b + head * m.h + column;
  return {data, m.r, rows, int(cols)};
}

// Of up to 256 there is room for on every GPU.
[[noreturn]] inline void refuse_columns(const AttentionTask& t) {
  refuse_value("the last dimension", "be smaller, there is too little shared memory for it", t.d > t.dv ? t.d : t.dv);
}

template <class S>
__device__ inline S minus_infinity() {
  return S(-__builtin_huge_val());
}

// exp, to the precision of what P is stored as.
template <class T>
__device__ inline Arithmetic<T> weight_of(Arithmetic<T> x) {
  if constexpr (kTensor<T>)
    return __expf(x);
  else
    return exp_of(x);
}

// Makes scores of products, for a tile of queries from `query` on and of keys from `key` on.
template <class T>
struct Scores {
  using S = Arithmetic<T>;
  const AttentionTask& task;
  const unsigned char* seen = nullptr;  // the mask at (query, key): bytes, or
  const T* added = nullptr;             // numbers
  int64_t query, key;
  bool all;  // is every key of the tile seen by every query, with nothing added?

  __device__ Scores(const AttentionTask& t, int64_t batch, int64_t head, int64_t query, int queries, int64_t key,
                    int keys)
      : task(t), query(query), key(key) {
    const AttentionMask& m = t.mask;
    const int64_t at = batch * m.b + head * m.h + query * m.q + key * m.k;
    if (m.data && m.boolean) seen = static_cast<const unsigned char*>(m.data) + at;
    if (m.data && !m.boolean) added = static_cast<const T*>(m.data) + at;
    all = !m.data && query + queries <= t.queries && key + keys <= t.keys && (!t.causal || key + keys - 1 <= query);
  }
  // Of query number i and key number j of the tile; -inf if it is not seen.
  __device__ S operator()(S product, int i, int j) const {
    const S s = product * S(task.scale);
    if (all) return s;
    if (query + i >= task.queries || key + j >= task.keys || (task.causal && key + j > query + i))
      return minus_infinity<S>();
    if (added) return s + S(added[i * task.mask.q + j * task.mask.k]);
    return !seen || seen[i * task.mask.q + j * task.mask.k] ? s : minus_infinity<S>();
  }
};

}  // namespace
}  // namespace gradops
