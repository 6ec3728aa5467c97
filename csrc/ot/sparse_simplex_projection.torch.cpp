#include "ot/sparse_simplex_projection.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

std::tuple<Tensor, Tensor, Tensor> sparse_simplex_projection(const Tensor& X_in, const Tensor& z_in, int64_t width) {
  STD_TORCH_CHECK(X_in.dim() >= 1 && z_in.dim() == X_in.dim() - 1, "sparse_simplex_projection: z must have X's batch");
  const int64_t size = X_in.size(-1);
  STD_TORCH_CHECK(width >= 0 && width <= size && size <= 0x7fffffff && (width > 0 || size == 0),
                  "sparse_simplex_projection: bad width or size");
  STD_TORCH_CHECK(z_in.scalar_type() == ScalarType::Double, "sparse_simplex_projection: z must be float64");
  same_device(X_in, z_in, "sparse_simplex_projection: X and z");
  const Scope scope(X_in);
  const Tensor X = contiguous_of(X_in), z = contiguous_of(z_in);
  std::vector<int64_t> shape;
  int64_t vectors = 1;
  for (int64_t i = 0; i < z.dim(); ++i) {
    STD_TORCH_CHECK(z.size(i) == X.size(i), "sparse_simplex_projection: z must have X's batch");
    shape.push_back(X.size(i)), vectors *= X.size(i);
  }
  Tensor tau = empty(X, shape, X.scalar_type());
  shape.push_back(width);
  Tensor values = empty(X, shape, X.scalar_type()), index = empty(X, shape, ScalarType::Long);
  if (vectors > 0)
    backend::sparse_simplex_projection(
        {X.const_data_ptr(), element(X, "sparse_simplex_projection: X"), vectors, size,
         static_cast<const double*>(z.const_data_ptr()), width, values.mutable_data_ptr(),
         static_cast<int64_t*>(index.mutable_data_ptr()), tau.mutable_data_ptr()},
        scope.stream());
  return {values, index, tau};
}

}  // namespace

GRADOPS_OP(sparse_simplex_projection,
           "sparse_simplex_projection(Tensor X, Tensor z, int width) -> (Tensor, Tensor, Tensor)")

}  // namespace gradops
