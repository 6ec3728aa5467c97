#include "linalg/gram.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor gram(const Tensor& j_in, bool wide) {
  STD_TORCH_CHECK(j_in.dim() >= 2, "gram: J must have at least 2 dimensions, got ", j_in.dim());
  STD_TORCH_CHECK(wide || j_in.scalar_type() != ScalarType::Double, "gram: J is float64, and so must its sums be");
  const Scope scope(j_in);
  const Tensor j = torch::stable::contiguous(j_in);
  std::vector<int64_t> shape(size_t(j.dim()));
  int64_t batch = 1;
  for (int64_t i = 0; i + 2 < j.dim(); ++i) batch *= shape[size_t(i)] = j.size(i);
  shape[shape.size() - 2] = shape[shape.size() - 1] = j.size(-2);
  Tensor g = empty(j, shape, wide ? ScalarType::Double : ScalarType::Float);
  const GramTask task{
      j.const_data_ptr(), g.mutable_data_ptr(), element(j, "gram: J"), batch, j.size(-2), j.size(-1), wide};
  if (batch == 0 || task.rows == 0) return g;
  const Workspace memory(j, backend::gram_workspace(task));
  backend::gram(task, memory.data(), scope.stream());
  return g;
}

}  // namespace

GRADOPS_OP(gram, "gram(Tensor J, bool wide) -> Tensor")

}  // namespace gradops
