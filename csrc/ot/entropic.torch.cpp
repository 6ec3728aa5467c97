#include "ot/entropic.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

using Maybe = std::optional<Tensor>;

const double* doubles(const Tensor& t, int64_t size, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double && t.numel() == size, "entropic: ", what,
                  " must be float64 with ", size, " numbers");
  return t.const_data_ptr<double>();
}
const int64_t* lengths(const Maybe& t, int64_t size, const char* what) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long && t->numel() == size, "entropic: ", what,
                  " must be int64 with ", size, " numbers");
  return t->const_data_ptr<int64_t>();
}
Maybe contiguous(const Maybe& t, const Tensor& like) {
  if (!t) return t;
  same_device(*t, like, "entropic: the inputs");
  return contiguous_of(*t);
}

// costs: (..., n, m); or points (..., n, d) with y (..., m, d)
std::tuple<Tensor, Tensor, Tensor> entropic(const Tensor& costs_in, const Maybe& y_in, const Tensor& a_in,
                                            const Tensor& b_in, const Maybe& alpha0_in, const Maybe& n_len_in,
                                            const Maybe& m_len_in, double reg, double tol, int64_t max_iter) {
  STD_TORCH_CHECK(costs_in.dim() >= 2, "entropic: costs must have at least 2 dimensions, got ", costs_in.dim());
  STD_TORCH_CHECK(reg > 0, "entropic: reg must be positive, got ", reg);
  const Scope scope(costs_in);
  const Tensor costs = contiguous_of(costs_in);
  const Tensor a = *contiguous(a_in, costs), b = *contiguous(b_in, costs);
  const Maybe y = contiguous(y_in, costs), alpha0 = contiguous(alpha0_in, costs);
  const Maybe n_len = contiguous(n_len_in, costs), m_len = contiguous(m_len_in, costs);
  std::vector<int64_t> shape(size_t(costs.dim()) - 2);
  int64_t batch = 1;
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = costs.size(int64_t(i)), batch *= shape[i];
  const int64_t n = costs.size(-2), d = y ? costs.size(-1) : 0, m = y ? y->size(-2) : costs.size(-1);
  if (y)
    STD_TORCH_CHECK(y->scalar_type() == costs.scalar_type() && y->size(-1) == d && y->numel() == batch * m * d,
                    "entropic: y must be like x, with the same last dimension");
  const auto output = [&](int64_t size) {
    std::vector<int64_t> with = shape;
    with.push_back(size);
    return empty(costs, with, ScalarType::Double);
  };
  Tensor alpha = output(n), beta = output(m), report = output(kEntropicReport);
  const EntropicTask task{y ? nullptr : costs.const_data_ptr(),
                          y ? costs.const_data_ptr() : nullptr,
                          y ? y->const_data_ptr() : nullptr,
                          element(costs, "entropic: costs"),
                          batch,
                          n,
                          m,
                          d,
                          lengths(n_len, batch, "n_len"),
                          lengths(m_len, batch, "m_len"),
                          doubles(a, batch * n, "a"),
                          doubles(b, batch * m, "b"),
                          alpha0 ? doubles(*alpha0, batch * n, "alpha0") : nullptr,
                          reg,
                          tol,
                          max_iter,
                          alpha.mutable_data_ptr<double>(),
                          beta.mutable_data_ptr<double>(),
                          report.mutable_data_ptr<double>()};
  const Workspace memory(costs, backend::entropic_workspace(task));
  if (batch > 0) backend::entropic(task, memory.data(), scope.stream());
  return {alpha, beta, report};
}

}  // namespace

GRADOPS_OP(entropic,
           "entropic(Tensor costs, Tensor? y, Tensor a, Tensor b, Tensor? alpha0, Tensor? n_len, Tensor? m_len, float "
           "reg, float tol, int max_iter) -> (Tensor, Tensor, Tensor)")

}  // namespace gradops
