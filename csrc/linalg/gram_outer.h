// gram_outer: sum over layers of the Gram matrices of their per-sample gradients sum_t g_t x_t^T, from inputs x and
// output gradients g. Torch-free interface. Sums are in double.
//
// Two forms. Token pairs: the products of all pairs of rows (sample, token) of x and of g, multiplied entry by entry
// and summed over tokens. Sample blocks: the gradients of a part of the weight for all samples at a time, never all at
// once.
#pragma once
#include <cstdint>

#include "linalg/gram.h"

namespace gradops {

struct OuterLayer {  // x: samples x tokens x d, g: samples x tokens x p, contiguous
  const void *x, *g;
  Element x_element, g_element;
  int64_t tokens, d, p;
  bool bias;
};
struct GramOuterTask {  // samples x samples, overwritten with the sum
  const OuterLayer* layers;
  int64_t count, samples;
  double* out;
};

// The products `x` and `g` of one group of rows with another (or itself: `diagonal`), as gram_sum left them, summed
// over the tokens: out[a][b] = sum of g (x + bias) over `tokens` rows of a and `others` columns of b.
struct OuterPairs {
  int64_t rows, cols, tokens, others;
  bool diagonal, bias;
};
GRADOPS_DECLARE(void, gram_outer_contract, const OuterPairs&, const void* x, void* g, double* out)

// A part of the gradient of one sample's weight, rows [row, row + rows) and columns [col, col + cols), and of those
// rows of its bias, to a run of gram_outer_part_size doubles, in an order of its own. packed: gram_outer_packed_size
// doubles.
struct OuterPart {
  int64_t row, rows, col, cols;
  bool bias;
};
GRADOPS_DECLARE(int64_t, gram_outer_part_size, int64_t rows, int64_t cols, bool bias)
GRADOPS_DECLARE(int64_t, gram_outer_packed_size, int64_t rows, int64_t cols)
GRADOPS_DECLARE(void, gram_outer_part, const OuterLayer&, int64_t sample, const OuterPart&, double* packed, double* to)

namespace cpu {
void gram_outer(const GramOuterTask&, void* workspace, void* = nullptr);  // by token pairs
int64_t gram_outer_workspace(const GramOuterTask&);                       // bytes
void gram_outer_blocks(const GramOuterTask&, void* workspace);            // one layer
int64_t gram_outer_blocks_workspace(const GramOuterTask&);
}  // namespace cpu
namespace cuda {
void gram_outer(const GramOuterTask&, void* workspace, void* stream);
int64_t gram_outer_workspace(const GramOuterTask&);
}  // namespace cuda
}  // namespace gradops
