// layer_norm: y = w n + b with n = (x - mean) rstd along each row, its gradient, and the changes of both.
// Without `center` it is RMS norm: mean = 0 and rstd that of the mean square. Torch-free interface.
//
// With M the mean over a row, a dot for a change, a = g w and p = rstd. / rstd:
//   forward       mean = M x,   rstd = (M (x - mean)^2 + eps)^-1/2        y = w n + b
//   jvp           mean. = M x., rstd. = -rstd^2 M (n (x. - mean.))        y. = w. n + w n. + b.
//                 n. = rstd (x. - mean.) + p n
//   backward      dx = rstd (a - M a - n M (a n)), dw = sum over the rows of g n, db = that of g
//   backward_jvp  dx. = p dx + rstd (a. - M a. - n. M (a n) - n M (a n).), dw. and db. by the product rule
// where M a and M a. are zero without `center`.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

enum class LayerNormPass { forward, jvp, backward, backward_jvp };

// What a pass reads and writes. A row's numbers are of `element`, weights and what is like them of `weight_element`.
struct LayerNormTask {
  LayerNormPass pass;
  int64_t batch, rows, n;  // each of the batch has a weight of its own
  double eps;
  bool center;
  Element element, weight_element;
  const void *x, *x_dot, *g, *g_dot;                  // batch x rows x n; a change that is null is zero
  const void *weight, *weight_dot, *bias, *bias_dot;  // batch x n; null: one for the weight, else zero
  double *stats, *stats_dot;                          // batch x rows x 2: mean and rstd
  void* out;                                          // y, y., dx or dx.; null: not wanted
  void *dweight, *dbias;                              // batch x n, or their changes; null: not wanted
};

// Rows of one item on the CPU. Here weights are of the type that is computed in, and none is null.
struct LayerNormRows {
  const void *x, *x_dot, *g, *g_dot;
  const void *weight, *weight_dot, *bias, *bias_dot;
  double *stats, *stats_dot;
  void* out;
  Element element;
  int64_t n;
  double eps;
  bool center;
  const void* zeros;  // a row
  void* buffers;      // kLayerNormBuffers rows of float, for numbers that are narrower
};
constexpr int kLayerNormBuffers = 5;

// Backward passes write the sums over rows [begin, end) to dweight and dbias, in the type that is computed in; null:
// not wanted.
GRADOPS_DECLARE(void, layer_norm_forward, const LayerNormRows&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, layer_norm_jvp, const LayerNormRows&, int64_t begin, int64_t end)
GRADOPS_DECLARE(void, layer_norm_backward, const LayerNormRows&, int64_t begin, int64_t end, void* dweight, void* dbias)
GRADOPS_DECLARE(void, layer_norm_backward_jvp, const LayerNormRows&, int64_t begin, int64_t end, void* dweight,
                void* dbias)
// to[c] = from[c], or `otherwise` where from is null, for numbers of type `to_element`, f32 or f64
GRADOPS_DECLARE(void, layer_norm_widen, const void* from, Element from_element, double otherwise, void* to,
                Element to_element, int64_t n)
// out[c] = partial[0][c] + partial[1][c] + ... in double, for columns [begin, end); a step lies between the rows
GRADOPS_DECLARE(void, layer_norm_total, const void* partial, Element partial_element, int64_t count, int64_t step,
                void* out, Element out_element, int64_t begin, int64_t end)

// Sums over rows are made in pieces of this many, and the pieces added in order: whatever the number of threads.
GRADOPS_BOTH constexpr int64_t layer_norm_piece(int64_t rows) {
  const int64_t piece = (rows + 63) / 64;
  return piece < 4 ? 4 : piece > 64 ? 64 : piece;
}

namespace cpu {
void layer_norm(const LayerNormTask&, void* workspace, void* = nullptr);
int64_t layer_norm_workspace(const LayerNormTask&);  // bytes
}  // namespace cpu
namespace cuda {
void layer_norm(const LayerNormTask&, void* workspace, void* stream);
int64_t layer_norm_workspace(const LayerNormTask&);
}  // namespace cuda
}  // namespace gradops
