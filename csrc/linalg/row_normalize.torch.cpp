#include "common/torch_op.h"
#include "linalg/row_normalize.h"

namespace gradops {
namespace {

std::tuple<Tensor, Tensor> row_normalize(const Tensor& x_in, double eps) {
  STD_TORCH_CHECK(x_in.dim() == 2, "row_normalize: x must be 2-D, got ", x_in.dim(), "-D");
  STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::Float, "row_normalize: x must be float32");
  const Scope scope(x_in);
  const Tensor x = x_in.stride(1) == 1 ? x_in : torch::stable::contiguous(x_in);
  const int64_t rows = x.size(0), cols = x.size(1);
  Tensor y = empty(x, {rows, cols}, ScalarType::Float), inv_norm = empty(x, {rows}, ScalarType::Float);
  backend::row_normalize(x.const_data_ptr<float>(), x.stride(0), y.mutable_data_ptr<float>(),
                         inv_norm.mutable_data_ptr<float>(), rows, cols, float(eps), scope.stream());
  return {y, inv_norm};
}

}  // namespace

GRADOPS_OP(row_normalize, "row_normalize(Tensor x, float eps) -> (Tensor y, Tensor inv_norm)")

}  // namespace gradops
