// Each block makes the outputs of a tile of queries (forward, jvp, dq) or of keys (dk, dv): its warps own 16 rows each,
// and the tiles of the other side pass through shared memory, fetched one ahead where there is room for two. Nothing
// is added up across blocks.
#include "common/reduce.cuh"
#include "curvature/attention_backward.cuh"
#include "curvature/attention_forward.cuh"
#include "curvature/scaled_dot_product_attention.h"

namespace gradops {
namespace {

// Makes D and D_dot of each row, one warp each, and puts them beside what else backward needs of it.
template <class T, class S>
__global__ void __launch_bounds__(128)
    row_numbers(const __grid_constant__ AttentionTask t, RowNumbers<S>* __restrict__ numbers, bool change) {
  const int64_t row = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (row >= t.batch * t.heads * t.queries) return;
  const int64_t query = row % t.queries, head = row / t.queries % t.heads, batch = row / (t.queries * t.heads);
  const T *const o = static_cast<const T*>(t.o), *const o_dot = static_cast<const T*>(t.o_dot),
                 *const g = source<T>(t.g, batch, head, t.queries, t.dv).data,
                 *const g_dot = source<T>(t.g_dot, batch, head, t.queries, t.dv).data;
  S sum = 0, sum_dot = 0;
  for (int64_t c = threadIdx.x % 32; c < t.dv; c += 32) {
    const S o_here = S(o[row * t.dv + c]), g_here = S(g[query * t.g.r + c]);
    sum += g_here * o_here;
    if (change && o_dot) sum_dot += g_here * S(o_dot[row * t.dv + c]);
    if (change && g_dot) sum_dot += S(g_dot[query * t.g_dot.r + c]) * o_here;
  }
  sum = warp_all(sum, Add());
  sum_dot = warp_all(sum_dot, Add());
  if (threadIdx.x % 32) return;
  const S mu = change && t.mu ? static_cast<const S*>(t.mu)[row] : S(0);
  numbers[row] = {static_cast<const S*>(t.lse)[row], mu, sum, sum_dot};
}

template <class T>
void backward(const AttentionTask& t, void* workspace, void* stream) {
  using S = Arithmetic<T>;
  const int64_t rows = t.batch * t.heads * t.queries;
  const bool change = t.dq_dot || t.dk_dot || t.dv_dot;
  auto* const numbers = static_cast<RowNumbers<S>*>(workspace);
  if (rows) launch(row_numbers<T, S>, blocks(up(rows, 4)), 128, 0, stream, t, numbers, change);
  if (change) {
    run_backward<T, true, true>(t, numbers, stream);
    run_backward<T, true, false>(t, numbers, stream);
  } else {
    run_backward<T, false, true>(t, numbers, stream);
    run_backward<T, false, false>(t, numbers, stream);
  }
}

}  // namespace

int64_t cuda::attention_workspace(const AttentionTask& t) {
  return t.batch * t.heads * t.queries *
         int64_t(t.element == Element::f64 ? sizeof(RowNumbers<double>) : sizeof(RowNumbers<float>));
}

void cuda::attention_forward(const AttentionTask& t, void*, void* stream) {
  with_device_type(t.element, [&](auto zero) {
    using T = decltype(zero);
    t.o_dot ? run_forward<T, true>(t, false, stream) : run_forward<T, false>(t, false, stream);
  });
}

void cuda::attention_jvp(const AttentionTask& t, void*, void* stream) {
  with_device_type(t.element, [&](auto zero) { run_forward<decltype(zero), true>(t, true, stream); });
}

void cuda::attention_backward(const AttentionTask& t, void* workspace, void* stream) {
  with_device_type(t.element, [&](auto zero) { backward<decltype(zero)>(t, workspace, stream); });
}

}  // namespace gradops
