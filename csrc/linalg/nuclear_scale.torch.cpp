#include "linalg/nuclear_scale.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor nuclear_scale(const Tensor& m_in, const Tensor& u_in) {
  STD_TORCH_CHECK(m_in.dim() >= 2, "nuclear_scale: M must have at least 2 dimensions, got ", m_in.dim());
  STD_TORCH_CHECK(m_in.dim() == u_in.dim() && m_in.scalar_type() == u_in.scalar_type(),
                  "nuclear_scale: M and U must have one shape and dtype");
  for (int64_t i = 0; i < m_in.dim(); ++i)
    STD_TORCH_CHECK(m_in.size(i) == u_in.size(i), "nuclear_scale: M and U must have one shape and dtype");
  same_device(m_in, u_in, "nuclear_scale: M and U");
  const Scope scope(m_in);
  const Tensor m = contiguous_of(m_in), u = contiguous_of(u_in);
  std::vector<int64_t> shape(size_t(m.dim() - 2));
  int64_t batch = 1;
  for (size_t i = 0; i < shape.size(); ++i) batch *= shape[i] = m.size(int64_t(i));
  Tensor out = empty(m, shape, ScalarType::Double);
  const NuclearScaleTask task{m.const_data_ptr(),
                              u.const_data_ptr(),
                              static_cast<double*>(out.mutable_data_ptr()),
                              element(m, "nuclear_scale: M"),
                              batch,
                              m.size(-2) * m.size(-1)};
  const Workspace memory(m, backend::nuclear_scale_workspace(task));
  backend::nuclear_scale(task, memory.data(), scope.stream());
  return out;
}

}  // namespace

GRADOPS_OP(nuclear_scale, "nuclear_scale(Tensor m, Tensor u) -> Tensor")

}  // namespace gradops
