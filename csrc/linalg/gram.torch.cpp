#include "linalg/gram.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor gram(std::vector<Tensor> list, bool wide) {
  STD_TORCH_CHECK(!list.empty(), "gram: J must hold at least one block");
  const Tensor& first = list[0];
  STD_TORCH_CHECK(first.dim() >= 2, "gram: J must have at least 2 dimensions, got ", first.dim());
  const Scope scope(first);
  std::vector<int64_t> shape(size_t(first.dim()));
  int64_t batch = 1;
  for (int64_t i = 0; i + 2 < first.dim(); ++i) batch *= shape[size_t(i)] = first.size(i);
  shape[shape.size() - 2] = shape[shape.size() - 1] = first.size(-2);
  std::vector<GramBlock> blocks;
  for (Tensor& j : list) {
    STD_TORCH_CHECK(j.dim() == first.dim(), "gram: J must be blocks of one matrix");
    for (int64_t i = 0; i + 1 < j.dim(); ++i)
      STD_TORCH_CHECK(j.size(i) == first.size(i), "gram: J must be blocks that agree in all but their columns");
    STD_TORCH_CHECK(wide || j.scalar_type() != ScalarType::Double, "gram: J is float64, and so must its sums be");
    same_device(first, j, "gram: all blocks of J");
    j = contiguous_of(j);
    blocks.push_back({j.const_data_ptr(), element(j, "gram: J"), j.size(-1)});
  }
  Tensor g = empty(first, shape, wide ? ScalarType::Double : ScalarType::Float);
  const GramTask task{blocks.data(), int64_t(blocks.size()), g.mutable_data_ptr(), batch, first.size(-2), wide};
  if (batch == 0 || task.rows == 0) return g;
  const Workspace memory(g, backend::gram_workspace(task));
  backend::gram(task, memory.data(), scope.stream());
  return g;
}

}  // namespace

GRADOPS_OP(gram, "gram(Tensor[] J, bool wide) -> Tensor")

}  // namespace gradops
