#include "ot/semidual.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

using Out = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Out semidual(const Tensor& alpha_in, std::optional<Tensor> M_in, std::optional<Tensor> x_in, std::optional<Tensor> y_in,
             const Tensor& a_in, const Tensor& b_in, double reg, int64_t max_nz, int64_t width,
             std::optional<Tensor> warm_alpha_in, std::optional<Tensor> warm_index_in,
             std::optional<Tensor> warm_weight_in, std::optional<Tensor> warm_tau_in) {
  STD_TORCH_CHECK(bool(M_in) != (x_in && y_in), "semidual: either M, or x and y");
  const Scope scope(alpha_in);
  const Tensor alpha = contiguous_of(alpha_in), a = contiguous_of(a_in), b = contiguous_of(b_in);
  const int64_t dims = alpha.dim();
  STD_TORCH_CHECK(dims >= 1 && a.dim() == dims && b.dim() == dims, "semidual: alpha, a and b must have one batch");
  const int64_t n = alpha.size(-1), m = b.size(-1);
  std::vector<int64_t> shape;
  int64_t batch = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) shape.push_back(alpha.size(i)), batch *= alpha.size(i);
  // `tensor` must be of the batch and end with these two sizes; without a second one, with the first.
  const auto check = [&](const Tensor& tensor, int64_t size, int64_t second, const char* what) {
    const int64_t own = second < 0 ? 1 : 2;
    STD_TORCH_CHECK(tensor.dim() == dims - 1 + own, what, " has the wrong number of dimensions");
    for (int64_t i = 0; i + 1 < dims; ++i)
      STD_TORCH_CHECK(tensor.size(i) == shape[size_t(i)], what, " has another batch");
    STD_TORCH_CHECK(tensor.size(dims - 1) == size && (second < 0 || tensor.size(dims) == second), what,
                    " has the wrong shape");
    same_device(tensor, alpha, "semidual: all tensors");
  };
  for (const Tensor& t : {alpha, a, b})
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "semidual: alpha, a and b must be float64");
  check(a, n, -1, "semidual: a"), check(b, m, -1, "semidual: b");
  STD_TORCH_CHECK(reg > 0 && max_nz >= 1 && width >= 0 && n <= 0x7fffffff, "semidual: bad reg, max_nz, width or size");
  SemidualTask task{};
  std::optional<Tensor> M, x, y, warm_alpha, warm_index, warm_weight, warm_tau;
  if (M_in) {
    M = contiguous_of(*M_in);
    check(*M, n, m, "semidual: M");
    task.matrix = M->const_data_ptr(), task.element = element(*M, "semidual: M");
  } else {
    x = contiguous_of(*x_in), y = contiguous_of(*y_in);
    task.d = x->size(-1);
    check(*x, n, task.d, "semidual: x"), check(*y, m, task.d, "semidual: y");
    STD_TORCH_CHECK(x->scalar_type() == y->scalar_type(), "semidual: x and y must have one dtype");
    task.x = x->const_data_ptr(), task.y = y->const_data_ptr(), task.element = element(*x, "semidual: x");
  }
  const auto doubles = [](const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); };
  if (warm_index_in) {
    STD_TORCH_CHECK(warm_alpha_in && warm_weight_in && warm_tau_in, "semidual: all of warm, or nothing");
    warm_alpha = contiguous_of(*warm_alpha_in), warm_index = contiguous_of(*warm_index_in),
    warm_weight = contiguous_of(*warm_weight_in), warm_tau = contiguous_of(*warm_tau_in);
    task.warm_width = warm_index->size(-1);
    check(*warm_alpha, n, -1, "semidual: warm_alpha"), check(*warm_tau, m, -1, "semidual: warm_tau");
    check(*warm_index, m, task.warm_width, "semidual: warm_index");
    check(*warm_weight, m, task.warm_width, "semidual: warm_weight");
    STD_TORCH_CHECK(warm_index->scalar_type() == ScalarType::Long, "semidual: warm_index must be int64");
    for (const Tensor& t : {*warm_alpha, *warm_weight, *warm_tau})
      STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double, "semidual: warm must be float64");
    task.warm_alpha = doubles(*warm_alpha), task.warm_weight = doubles(*warm_weight),
    task.warm_tau = doubles(*warm_tau);
    task.warm_index = static_cast<const int64_t*>(warm_index->const_data_ptr());
  }
  const auto sized = [&](std::initializer_list<int64_t> own, ScalarType type) {
    std::vector<int64_t> all = shape;
    all.insert(all.end(), own);
    return empty(alpha, all, type);
  };
  Tensor value = sized({}, ScalarType::Double), grad = sized({n}, ScalarType::Double),
         index = sized({m, width}, ScalarType::Long), weight = sized({m, width}, ScalarType::Double),
         tau = sized({m}, ScalarType::Double), kept = sized({m}, ScalarType::Long);
  task.batch = batch, task.n = n, task.m = m, task.reg = reg, task.max_nz = max_nz < n ? max_nz : n;
  task.alpha = doubles(alpha), task.a = doubles(a), task.b = doubles(b);
  task.value = static_cast<double*>(value.mutable_data_ptr()),
  task.grad = static_cast<double*>(grad.mutable_data_ptr());
  task.width = width, task.index = static_cast<int64_t*>(index.mutable_data_ptr());
  task.weight = static_cast<double*>(weight.mutable_data_ptr());
  task.tau = static_cast<double*>(tau.mutable_data_ptr()), task.kept = static_cast<int64_t*>(kept.mutable_data_ptr());
  if (batch == 0) return {value, grad, index, weight, tau, kept};
  const Workspace memory(alpha, backend::semidual_workspace(task));
  backend::semidual(task, memory.data(), scope.stream());
  return {value, grad, index, weight, tau, kept};
}

}  // namespace

GRADOPS_OP(
    semidual,
    "semidual(Tensor alpha, Tensor? M, Tensor? x, Tensor? y, Tensor a, Tensor b, float reg, int max_nz, int width, "
    "Tensor? warm_alpha, Tensor? warm_index, Tensor? warm_weight, Tensor? warm_tau) -> (Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)")

}  // namespace gradops
