#include "rl/top_p_keep.h"

#include "common/torch_op.h"

namespace gradops {
namespace {

Tensor top_p_keep(const Tensor& logits_in, double p, int64_t min_keep) {
  STD_TORCH_CHECK(logits_in.dim() >= 1, "top_p_keep: logits must have at least 1 dimension");
  STD_TORCH_CHECK(p > 0 && p <= 1 && min_keep >= 1, "top_p_keep: p must be in (0, 1], min_keep at least 1");
  const Scope scope(logits_in);
  const Tensor logits = contiguous_of(logits_in);
  std::vector<int64_t> shape(size_t(logits.dim()));
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = logits.size(int64_t(i));
  Tensor mask = empty(logits, shape, ScalarType::Bool);
  const int64_t cols = shape.back();
  const TopPTask task{logits.const_data_ptr(),
                      element(logits, "top_p_keep: logits"),
                      cols == 0 ? 0 : logits.numel() / cols,
                      cols,
                      p,
                      min_keep,
                      static_cast<bool*>(mask.mutable_data_ptr())};
  backend::top_p_keep(task, scope.stream());
  return mask;
}

}  // namespace

GRADOPS_OP(top_p_keep, "top_p_keep(Tensor logits, float p, int min_keep) -> Tensor")

}  // namespace gradops
