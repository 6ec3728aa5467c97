// wide_matmul: products of 16-bit matrices with sums, and if wanted results, in float, which torch has on CUDA only.
// Torch-free interface; CPU only.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

struct WideOperand {  // entry (i, k) is data[i * stride + k]; transposed: data[k * stride + i]
  const void* data;
  Element element;
  bool transposed;
  int64_t stride;
};

struct WideMatmulTask {     // out = left right, or out += left right
  WideOperand left, right;  // rows x inner and inner x cols, of bf16 or f16; left may be f32
  void* out;                // entry (i, j) is out[i * out_stride + j]
  Element out_element;      // f32, or that of right
  int64_t out_stride, rows, cols, inner;
  bool add;  // only with an out of f32
};

// The work is units, independent of each other.
struct WideMatmulEngine {
  int64_t (*units)(const WideMatmulTask&);
  int64_t (*scratch_bytes)(const WideMatmulTask&);  // of the calling thread
  void (*run)(const WideMatmulTask&, char* scratch, int64_t begin, int64_t end);
};
// In float: 16-bit numbers are widened.
GRADOPS_DECLARE(const WideMatmulEngine&, wide_matmul_full)
// Of bf16; a left operand of f32 is rounded to it.
GRADOPS_DECLARE_BF16(const WideMatmulEngine&, wide_matmul_bf16)

namespace cpu {
void wide_matmul_(const WideMatmulTask&);
}
}  // namespace gradops
