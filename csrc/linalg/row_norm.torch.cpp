#include "linalg/row_norm.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor row_norm(const Tensor& x_in, double eps, bool center) {
  STD_TORCH_CHECK(x_in.dim() >= 2, "row_norm: x must have at least 2 dimensions, got ", x_in.dim());
  const Scope scope(x_in);
  const Tensor x = contiguous_of(x_in);
  Tensor y = new_like(x);
  const int64_t rows = x.size(-2), cols = x.size(-1);
  const RowNormTask task{x.const_data_ptr(),
                         y.mutable_data_ptr(),
                         element(x, "row_norm: x"),
                         x.numel() == 0 ? 0 : x.numel() / (rows * cols),
                         rows,
                         cols,
                         eps,
                         center};
  const Workspace memory(x, backend::row_norm_workspace(task));
  backend::row_norm(task, memory.data(), scope.stream());
  return y;
}

}  // namespace

GRADOPS_OP(row_norm, "row_norm(Tensor x, float eps, bool center) -> Tensor")

}  // namespace gradops
