#include "ot/plan_vjp.h"

#include "common/torch_op.h"

#if GRADOPS_BACKEND_ID == 1
namespace gradops {
namespace {

std::tuple<Tensor, Tensor, Tensor> plan_vjp(const Tensor& index_in, const Tensor& value_in, const Tensor& g_in,
                                            const Tensor& p_in, const Tensor& q_in) {
  const int64_t dim = index_in.dim();
  STD_TORCH_CHECK(dim >= 2 && index_in.scalar_type() == ScalarType::Long,
                  "plan_vjp: index must be int64 (..., m, width)");
  const auto check = [&](const Tensor& x, int64_t dims, const char* what) {
    bool good = x.scalar_type() == ScalarType::Double && x.dim() == dims;
    for (int64_t i = 0; good && i + 2 < dim; ++i) good = x.size(i) == index_in.size(i);
    STD_TORCH_CHECK(good, "plan_vjp: ", what, " must be float64 with the leading dimensions of index");
  };
  check(value_in, dim, "value"), check(g_in, dim, "g"), check(p_in, dim - 1, "p"), check(q_in, dim - 1, "q");
  const int64_t n = p_in.size(-1), m = index_in.size(-2), width = index_in.size(-1);
  STD_TORCH_CHECK(value_in.size(-2) == m && value_in.size(-1) == width && g_in.size(-2) == m &&
                      g_in.size(-1) == width && q_in.size(-1) == m,
                  "plan_vjp: shapes do not fit: index, value and g (..., m, width), p (..., n), q (..., m)");
  const Tensor index = contiguous_of(index_in), value = contiguous_of(value_in);
  const Tensor g = contiguous_of(g_in), p = contiguous_of(p_in), q = contiguous_of(q_in);
  int64_t batch = 1;
  for (int64_t i = 0; i + 2 < dim; ++i) batch *= index.size(i);
  Tensor r = new_like(g), u = new_like(p), v = new_like(q);
  const auto read = [](const Tensor& x) { return static_cast<const double*>(x.const_data_ptr()); };
  const auto write = [](Tensor& x) { return static_cast<double*>(x.mutable_data_ptr()); };
  cpu::plan_vjp({static_cast<const int64_t*>(index.const_data_ptr()), read(value), read(g), read(p), read(q), write(r),
                 write(u), write(v), batch, n, m, width});
  return {r, u, v};
}

}  // namespace

GRADOPS_OP(plan_vjp, "plan_vjp(Tensor index, Tensor value, Tensor g, Tensor p, Tensor q) -> (Tensor, Tensor, Tensor)")

}  // namespace gradops
#endif
