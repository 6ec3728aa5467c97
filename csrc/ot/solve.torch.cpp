#include "ot/solve.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> solve(
    const std::optional<Tensor>& M_in, const std::optional<Tensor>& x_in, const std::optional<Tensor>& y_in,
    const Tensor& a_in, const Tensor& b_in, const std::optional<Tensor>& alpha0_in,
    const std::optional<Tensor>& n_len_in, const std::optional<Tensor>& m_len_in, double reg, int64_t max_nz,
    double tol, double gap_tol, int64_t max_iter, int64_t width, bool averaged) {
  STD_TORCH_CHECK(bool(M_in) != (x_in && y_in), "solve: either M, or x and y");
  STD_TORCH_CHECK(reg > 0 && max_nz >= 0 && width >= 1, "solve: bad reg, max_nz or width");
  const Scope scope(a_in);
  const Tensor a = contiguous_of(a_in), b = contiguous_of(b_in);
  const int64_t dims = a.dim();
  STD_TORCH_CHECK(dims >= 1 && b.dim() == dims, "solve: a and b must have one batch");
  const int64_t n = a.size(-1), m = b.size(-1);
  STD_TORCH_CHECK(n <= 0x7fffffff && m <= 0x7fffffff, "solve: too large");
  std::vector<int64_t> shape;
  int64_t batch = 1;
  for (int64_t i = 0; i + 1 < dims; ++i) shape.push_back(a.size(i)), batch *= a.size(i);
  // A contiguous tensor of the batch that ends with these sizes.
  const auto checked = [&](const Tensor& given, std::vector<int64_t> own, const char* what) {
    std::vector<int64_t> want = shape;
    want.insert(want.end(), own.begin(), own.end());
    bool good = given.dim() == int64_t(want.size());
    for (size_t i = 0; good && i < want.size(); ++i) good = given.size(int64_t(i)) == want[i];
    STD_TORCH_CHECK(good, "solve: ", what, " has the wrong shape");
    same_device(given, a, "solve: all tensors");
    return contiguous_of(given);
  };
  const auto of_type = [&](const Tensor& t, ScalarType type, const char* what) {
    STD_TORCH_CHECK(t.scalar_type() == type, "solve: ", what);
  };
  of_type(a, ScalarType::Double, "a must be float64"), of_type(b, ScalarType::Double, "b must be float64");
  checked(b, {m}, "b");
  SolveTask task{};
  Transport& t = task.first;
  std::optional<Tensor> M, x, y, alpha0, n_len, m_len;
  if (M_in) {
    M = checked(*M_in, {n, m}, "M");
    t.cost = {M->const_data_ptr(), nullptr, nullptr, element(*M, "solve: M"), n, m, 0};
  } else {
    const int64_t d = x_in->dim() > 0 ? x_in->size(-1) : 0;
    x = checked(*x_in, {n, d}, "x"), y = checked(*y_in, {m, d}, "y");
    STD_TORCH_CHECK(x->scalar_type() == y->scalar_type(), "solve: x and y must have one dtype");
    t.cost = {nullptr, x->const_data_ptr(), y->const_data_ptr(), element(*x, "solve: x"), n, m, d};
  }
  if (alpha0_in) {
    alpha0 = checked(*alpha0_in, {n}, "alpha0");
    of_type(*alpha0, ScalarType::Double, "alpha0 must be float64");
    t.alpha0 = static_cast<const double*>(alpha0->const_data_ptr());
  }
  const auto lengths = [&](const std::optional<Tensor>& given, std::optional<Tensor>& kept, const char* what) {
    if (!given) return static_cast<const int64_t*>(nullptr);
    kept = checked(*given, {}, what);
    of_type(*kept, ScalarType::Long, "n_len and m_len must be int64");
    return static_cast<const int64_t*>(kept->const_data_ptr());
  };
  task.n_len = lengths(n_len_in, n_len, "n_len"), task.m_len = lengths(m_len_in, m_len, "m_len");
  task.batch = batch;
  const auto sized = [&](std::initializer_list<int64_t> own, ScalarType type) {
    std::vector<int64_t> all = shape;
    all.insert(all.end(), own);
    return empty(a, all, type);
  };
  Tensor alpha = sized({n}, ScalarType::Double), beta = sized({m}, ScalarType::Double),
         index = sized({m, width}, ScalarType::Long), weight = sized({m, width}, ScalarType::Double),
         report = sized({kTransportReport}, ScalarType::Double);
  const auto write = [](Tensor& out) { return static_cast<double*>(out.mutable_data_ptr()); };
  t.a = static_cast<const double*>(a.const_data_ptr()), t.b = static_cast<const double*>(b.const_data_ptr());
  t.reg = reg, t.max_nz = max_nz < n ? max_nz : 0;
  t.tol = tol, t.gap_tol = gap_tol, t.max_iter = max_iter, t.width = width;
  t.averaged = averaged;
  t.alpha = write(alpha), t.beta = write(beta), t.weight = write(weight);
  t.index = static_cast<int64_t*>(index.mutable_data_ptr());
  t.report = reinterpret_cast<TransportReport*>(write(report));
  if (batch > 0) {
    const Workspace memory(a, backend::solve_workspace(task));
    backend::solve(task, memory.data(), scope.stream());
  }
  return {alpha, beta, index, weight, report};
}

}  // namespace

GRADOPS_OP(solve,
           "solve(Tensor? M, Tensor? x, Tensor? y, Tensor a, Tensor b, Tensor? alpha0, Tensor? n_len, Tensor? m_len, "
           "float reg, int max_nz, float tol, float gap_tol, int max_iter, int width, bool averaged) "
           "-> (Tensor, Tensor, Tensor, Tensor, Tensor)")

}  // namespace gradops
