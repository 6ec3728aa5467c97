#include "linalg/wide_matmul.h"

#include "common/torch_op.h"

namespace gradops {
#if GRADOPS_BACKEND_ID == 1
namespace {

// x as the kernels read it, with one stride that is 1; `memory` keeps a copy where it must be one
WideOperand operand(const Tensor& x, const char* name, Tensor& memory) {
  STD_TORCH_CHECK(x.dim() == 2, "wide_matmul_: ", name, " must have 2 dimensions");
  const auto lies_in_lines = [&](int64_t along, int64_t across) {
    return (x.size(along) <= 1 || x.stride(along) == 1) && (x.size(across) <= 1 || x.stride(across) >= x.size(along));
  };
  const bool by_rows = lies_in_lines(1, 0), transposed = !by_rows && lies_in_lines(0, 1);
  memory = by_rows || transposed ? x : contiguous_of(x);
  return {memory.const_data_ptr(), element(x, name), transposed, memory.stride(transposed ? 1 : 0)};
}

// Schema: see below. A broadcast operand is copied.
void wide_matmul_(Tensor out, const Tensor& left, const Tensor& right, bool add) {
  Tensor left_memory = left, right_memory = right;
  const WideOperand l = operand(left, "left", left_memory), r = operand(right, "right", right_memory);
  const Element to = element(out, "wide_matmul_: out");
  const int64_t rows = left.size(0), inner = left.size(1), cols = right.size(1);
  STD_TORCH_CHECK(right.size(0) == inner && out.dim() == 2 && out.size(0) == rows && out.size(1) == cols,
                  "wide_matmul_: the shapes of out, left and right must be (m, n), (m, k) and (k, n)");
  STD_TORCH_CHECK(r.element == Element::bf16 || r.element == Element::f16,
                  "wide_matmul_: right must be bfloat16 or float16");
  STD_TORCH_CHECK(l.element == r.element || l.element == Element::f32,
                  "wide_matmul_: left must be float32 or have the dtype of right");
  STD_TORCH_CHECK(to == Element::f32 || (to == r.element && !add),
                  "wide_matmul_: out must be float32 or, without add, have the dtype of right");
  STD_TORCH_CHECK((cols <= 1 || out.stride(1) == 1) && (rows <= 1 || out.stride(0) >= cols),
                  "wide_matmul_: the rows of out must be contiguous");
  if (rows == 0 || cols == 0) return;
  if (inner == 0) {
    if (!add) torch::stable::zero_(out);
    return;
  }
  cpu::wide_matmul_({l, r, out.mutable_data_ptr(), to, out.stride(0), rows, cols, inner, add});
}

}  // namespace

// out = left right, or out += left right, with sums in float32.
GRADOPS_OP(wide_matmul_, "wide_matmul_(Tensor(a!) out, Tensor left, Tensor right, bool add) -> ()")
#endif
}  // namespace gradops
