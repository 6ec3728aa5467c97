// Each block makes the outputs of a tile of queries (forward, jvp, dq) or of keys (dk, dv): its warps own 16 rows each,
// and the tiles of the other side pass through shared memory, fetched one ahead where there is room for two. Nothing
// is added up across blocks.
#include "curvature/scaled_dot_product_attention.h"

#include "common/reduce.cuh"
#include "curvature/attention_backward.cuh"
#include "curvature/attention_forward.cuh"

namespace gradops {
namespace {

// D and D_dot of each row, one warp each.
template <class T, class S>
__global__ void __launch_bounds__(128)
    row_products(const __grid_constant__ AttentionTask t, S* __restrict__ d, S* __restrict__ d_dot) {
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
    if (d_dot && o_dot) sum_dot += g_here * S(o_dot[row * t.dv + c]);
    if (d_dot && g_dot) sum_dot += S(g_dot[query * t.g_dot.r + c]) * o_here;
  }
  sum = warp_all(sum, Add());
  sum_dot = warp_all(sum_dot, Add());
  if (threadIdx.x % 32 == 0) {
    d[row] = sum;
    if (d_dot) d_dot[row] = sum_dot;
  }
}

template <class T>
void backward(const AttentionTask& t, void* workspace, void* stream) {
  using S = Arithmetic<T>;
  const int64_t rows = t.batch * t.heads * t.queries;
  const bool change = t.dq_dot || t.dk_dot || t.dv_dot;
  S *const d = static_cast<S*>(workspace), *const d_dot = change ? d + rows : nullptr;
  if (rows) launch(row_products<T, S>, blocks(up(rows, 4)), 128, 0, stream, t, d, d_dot);
  if (change) {
    run_backward<T, true, true>(t, d, d_dot, stream);
    run_backward<T, true, false>(t, d, d_dot, stream);
  } else {
    run_backward<T, false, true>(t, d, d_dot, stream);
    run_backward<T, false, false>(t, d, d_dot, stream);
  }
}

}  // namespace

int64_t cuda::attention_workspace(const AttentionTask& t) {
  return 2 * t.batch * t.heads * t.queries * (t.element == Element::f64 ? 8 : 4);
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
