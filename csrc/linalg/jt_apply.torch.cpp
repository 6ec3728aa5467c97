#include "linalg/jt_apply.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor jt_apply(const Tensor& j_in, const Tensor& w_in) {
  STD_TORCH_CHECK(j_in.dim() >= 2 && w_in.dim() == j_in.dim() - 1 && w_in.scalar_type() == ScalarType::Double,
                  "jt_apply: J must be (..., B, P), and w (..., B) in float64");
  for (int64_t i = 0; i < w_in.dim(); ++i)
    STD_TORCH_CHECK(w_in.size(i) == j_in.size(i), "jt_apply: w must have the shape of J less the last dimension");
  same_device(j_in, w_in, "jt_apply: J and w");
  const Scope scope(j_in);
  const Tensor j = contiguous_of(j_in), w = contiguous_of(w_in);
  std::vector<int64_t> shape(size_t(w.dim()));
  int64_t batch = 1;
  for (int64_t i = 0; i + 1 < w.dim(); ++i) batch *= shape[size_t(i)] = j.size(i);
  shape.back() = j.size(-1);
  Tensor y = empty(j, shape, j.scalar_type());
  const JtApplyTask task{j.const_data_ptr(),
                         static_cast<const double*>(w.const_data_ptr()),
                         y.mutable_data_ptr(),
                         element(j, "jt_apply: J"),
                         batch,
                         j.size(-2),
                         j.size(-1)};
  backend::jt_apply(task, scope.stream());
  return y;
}

}  // namespace

GRADOPS_OP(jt_apply, "jt_apply(Tensor J, Tensor w) -> Tensor")

}  // namespace gradops
