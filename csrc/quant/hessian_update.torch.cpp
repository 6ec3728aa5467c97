#include "quant/hessian_update.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

// H or D, one matrix per item; X is (items, tokens, n). The checks that no wrong call may get past; what
// users read is in Python.
Tensor update(const char* op, const Tensor& h_in, const Tensor& x_in, const Tensor* x_q_in, const Tensor& n_seen_in,
              const std::optional<Tensor>& mask_in, bool split) {
  const std::string name(op);
  STD_TORCH_CHECK(h_in.dim() == 3 && x_in.dim() == 3, name, ": matrices must have 3 dimensions");
  const int64_t batch = h_in.size(0), n = h_in.size(1), tokens = x_in.size(1);
  STD_TORCH_CHECK(h_in.size(2) == n && x_in.size(0) == batch && x_in.size(2) == n, name, ": shapes do not match");
  STD_TORCH_CHECK(n_seen_in.dim() == 1 && n_seen_in.size(0) == batch && n_seen_in.scalar_type() == ScalarType::Long,
                  name, ": n_seen must be int64, one per item");
  const Scope scope(h_in);
  same_device(h_in, x_in, op);
  same_device(h_in, n_seen_in, op);
  const auto contiguous = [](const Tensor& t) { return contiguous_of(t); };
  Tensor h = contiguous(h_in);
  const Tensor x = contiguous(x_in), n_seen = contiguous(n_seen_in);
  Tensor n_new = new_like(n_seen);
  HessianTask task{};
  Tensor x_q = x, mask = x;
  if (x_q_in) {
    STD_TORCH_CHECK(x_q_in->dim() == 3 && x_q_in->size(0) == batch && x_q_in->size(1) == tokens &&
                        x_q_in->size(2) == n && x_q_in->scalar_type() == x.scalar_type(),
                    name, ": X_q must be like X_fp");
    same_device(h_in, *x_q_in, op);
    x_q = contiguous(*x_q_in);
    task.x_q = x_q.const_data_ptr();
  }
  if (mask_in) {
    STD_TORCH_CHECK(mask_in->dim() == 2 && mask_in->size(0) == batch && mask_in->size(1) == tokens &&
                        mask_in->scalar_type() == ScalarType::Bool,
                    name, ": mask must be bool, one per token");
    same_device(h_in, *mask_in, op);
    mask = contiguous(*mask_in);
    task.mask = static_cast<const bool*>(mask.const_data_ptr());
  }
  task.x = x.const_data_ptr();
  task.element = element(x, "X");
  task.n_seen = static_cast<const int64_t*>(n_seen.const_data_ptr());
  task.n_new = static_cast<int64_t*>(n_new.mutable_data_ptr());
  task.h = h.mutable_data_ptr();
  task.h_element = element(h, "H");
  task.batch = batch, task.tokens = tokens, task.n = n, task.split = split;
  STD_TORCH_CHECK(task.h_element == Element::f64 || (task.h_element == Element::f32 && task.element != Element::f64),
                  name, ": H must be float64, or float32 if X is not float64");
  const Workspace memory(x, backend::hessian_update_workspace(task));
  backend::hessian_update(task, memory.data(), scope.stream());
  if (h.const_data_ptr() != h_in.const_data_ptr()) {
    Tensor target = h_in;
    torch::stable::copy_(target, h);
  }
  return n_new;
}

Tensor hessian_update_(const Tensor& H, const Tensor& X, const Tensor& n_seen, const std::optional<Tensor>& mask,
                       bool split) {
  return update("hessian_update_", H, X, nullptr, n_seen, mask, split);
}
Tensor gptaq_cross_update_(const Tensor& D, const Tensor& X_fp, const Tensor& X_q, const Tensor& n_seen,
                           const std::optional<Tensor>& mask, bool split) {
  return update("gptaq_cross_update_", D, X_fp, &X_q, n_seen, mask, split);
}

}  // namespace

GRADOPS_OP(hessian_update_,
           "hessian_update_(Tensor(a!) H, Tensor X, Tensor n_seen, Tensor? mask, bool split) -> Tensor")
GRADOPS_OP(gptaq_cross_update_,
           "gptaq_cross_update_(Tensor(a!) D, Tensor X_fp, Tensor X_q, Tensor n_seen, Tensor? mask, bool split) "
           "-> Tensor")

}  // namespace gradops
