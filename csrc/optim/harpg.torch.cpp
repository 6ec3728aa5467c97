#include "optim/harpg.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

// Whether the numbers of x fill a stretch of memory, in any order of dimensions
bool dense(const Tensor& x) {
  std::vector<bool> used(size_t(x.dim()), false);
  int64_t expected = 1;
  for (int64_t step = 0; step < x.dim(); ++step) {
    int64_t found = -1;
    for (int64_t i = 0; i < x.dim(); ++i)
      if (!used[size_t(i)] && (found < 0 || x.size(i) == 1) && (x.size(i) == 1 || x.stride(i) == expected)) found = i;
    if (found < 0) return x.numel() == 0;
    used[size_t(found)] = true;
    expected *= x.size(found);
  }
  return true;
}

// x, or a copy of it whose numbers lie in memory as those of d do
Tensor laid_like(const Tensor& x, const Tensor& d, const char* op, const char* name) {
  bool shape = x.dim() == d.dim(), same = true;
  for (int64_t i = 0; shape && i < d.dim(); ++i) {
    shape = x.size(i) == d.size(i);
    same = same && (d.size(i) == 1 || x.stride(i) == d.stride(i));
  }
  STD_TORCH_CHECK(shape, op, ": ", name, " must have the shapes of d");
  same_device(x, d, op);
  if (same || d.numel() == 0) return x;
  Tensor copy = torch::stable::empty_like(d);
  if (copy.scalar_type() != x.scalar_type()) copy = torch::stable::to(copy, x.scalar_type());
  return torch::stable::copy_(copy, x);
}

Tensor harpg_update_(std::vector<Tensor> d, std::vector<Tensor> change, std::vector<Tensor> grad,
                     std::vector<double> eta, std::vector<double> sign) {
  const size_t n = d.size();
  STD_TORCH_CHECK(
      n > 0 && grad.size() == n && (change.empty() || change.size() == n) && eta.size() == n && sign.size() == n,
      "harpg_update_: d, grad, eta, sign, and change if there are any, must be as many, and one at least");
  const Scope scope(d[0]);
  std::vector<HarpgUpdate> list;
  int64_t chunks = 0;
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(dense(d[i]), "harpg_update_: d must be dense");
    same_device(d[0], d[i], "harpg_update_: all d");
    grad[i] = laid_like(grad[i], d[i], "harpg_update_", "grad");
    if (!change.empty()) change[i] = laid_like(change[i], d[i], "harpg_update_", "change");
    const Element type = element(d[i], "harpg_update_: d");
    list.push_back({d[i].mutable_data_ptr(), change.empty() ? nullptr : change[i].const_data_ptr(),
                    grad[i].const_data_ptr(), type, change.empty() ? type : element(change[i], "harpg_update_: change"),
                    element(grad[i], "harpg_update_: grad"), d[i].numel(), eta[i], sign[i]});
    chunks += harpg_chunks(d[i].numel());
  }
  Tensor norm = empty(d[0], {}, ScalarType::Double);
  const Workspace memory(norm, 8 * chunks);
  backend::harpg_update(list.data(), int64_t(n), static_cast<double*>(memory.data()),
                        static_cast<double*>(norm.mutable_data_ptr()), scope.stream());
  return norm;
}

void harpg_apply_(std::vector<Tensor> params, std::vector<Tensor> d, std::vector<Tensor> scale, double lr,
                  std::optional<Tensor> lr_tensor, std::optional<Tensor> norm) {
  const size_t n = params.size();
  STD_TORCH_CHECK(n > 0 && d.size() == n && scale.size() == n,
                  "harpg_apply_: params, d and scale must be as many, and one at least");
  const Scope scope(params[0]);
  std::vector<HarpgApply> list;
  std::vector<Tensor> laid;
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(dense(d[i]), "harpg_apply_: d must be dense");
    laid.push_back(laid_like(params[i], d[i], "harpg_apply_", "params"));
    STD_TORCH_CHECK(scale[i].numel() == 1 && scale[i].scalar_type() == d[i].scalar_type(),
                    "harpg_apply_: scale must have one number, of the dtype of d");
    same_device(params[0], params[i], "harpg_apply_: all params");
    same_device(scale[i], params[i], "harpg_apply_: scale and params");
    list.push_back({laid[i].mutable_data_ptr(), d[i].const_data_ptr(), scale[i].mutable_data_ptr(),
                    element(params[i], "harpg_apply_: params"), element(d[i], "harpg_apply_: d"), params[i].numel()});
  }
  HarpgStep step{lr, nullptr, Element::f64, nullptr};
  if (lr_tensor) {
    STD_TORCH_CHECK(lr_tensor->numel() == 1, "harpg_apply_: lr_tensor must have one number");
    same_device(params[0], *lr_tensor, "harpg_apply_: lr_tensor and params");
    step.lr_tensor = lr_tensor->const_data_ptr();
    step.lr_element = element(*lr_tensor, "harpg_apply_: lr_tensor");
  }
  if (norm) {
    STD_TORCH_CHECK(norm->numel() == 1 && norm->scalar_type() == ScalarType::Double,
                    "harpg_apply_: norm must have one number, in float64");
    same_device(params[0], *norm, "harpg_apply_: norm and params");
    step.norm = static_cast<const double*>(norm->const_data_ptr());
  }
  backend::harpg_apply(list.data(), int64_t(n), step, scope.stream());
  for (size_t i = 0; i < n; ++i)
    if (laid[i].get() != params[i].get()) torch::stable::copy_(params[i], laid[i]);
}

}  // namespace

GRADOPS_OP(harpg_update_,
           "harpg_update_(Tensor(a!)[] d, Tensor[] change, Tensor[] grad, float[] eta, float[] sign) -> Tensor")
GRADOPS_OP(harpg_apply_,
           "harpg_apply_(Tensor(a!)[] params, Tensor[] d, Tensor(b!)[] scale, float lr, Tensor? lr_tensor, "
           "Tensor? norm) -> ()")

}  // namespace gradops
