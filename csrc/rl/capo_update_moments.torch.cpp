#include "rl/capo_update_moments.h"

#include <optional>

#include "rl/capo_tensors.h"

namespace gradops {
namespace {

#if GRADOPS_BACKEND_ID != 1
// keys in order, and where each came from; stable, so that equal keys keep their order
std::tuple<Tensor, Tensor> sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  StableIValue stack[] = {from(keys), from(std::optional<bool>(true)), from(int64_t(-1)), from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}
#endif

void capo_update_moments_(Tensor exp_avg, Tensor exp_avg_sq, const Tensor& hidden, const Tensor& probs,
                          const Tensor& action, const Tensor& advantages, const Tensor& token_ids,
                          const Tensor& mask_in, double beta1, double beta2) {
  const Scope scope(hidden);
  const CapoInput in("capo_update_moments_", hidden, probs, action, advantages);
  const CapoRows rows("capo_update_moments_", in, token_ids, exp_avg, exp_avg_sq);
  STD_TORCH_CHECK(mask_in.dim() == 1 && mask_in.size(0) == hidden.size(0) && mask_in.scalar_type() == ScalarType::Bool,
                  "capo_update_moments_: mask must be bool, with one entry per token");
  same_device(hidden, mask_in, "capo_update_moments_: all tensors");
  const Tensor mask = contiguous_of(mask_in);
  const CapoUpdate task{in.tokens(),
                        rows.ids(),
                        static_cast<const bool*>(mask.const_data_ptr()),
                        exp_avg.mutable_data_ptr(),
                        exp_avg_sq.mutable_data_ptr(),
                        exp_avg.size(0),
                        beta1,
                        beta2};
#if GRADOPS_BACKEND_ID == 1
  const Workspace memory(hidden, backend::capo_update_moments_workspace(task));
  backend::capo_update_moments(task, memory.data(), scope.stream());
#else
  const Tensor keys = empty(hidden, {hidden.size(0) * probs.size(1)}, ScalarType::Long);
  backend::capo_update_keys(task, static_cast<int64_t*>(keys.mutable_data_ptr()), scope.stream());
  const auto [sorted, order] = sort(keys);
  backend::capo_update_sorted(task, static_cast<const int64_t*>(sorted.const_data_ptr()),
                              static_cast<const int64_t*>(order.const_data_ptr()), scope.stream());
#endif
}

}  // namespace

GRADOPS_OP(capo_update_moments_,
           "capo_update_moments_(Tensor(a!) exp_avg, Tensor(b!) exp_avg_sq, Tensor hidden, Tensor probs, "
           "Tensor action_index, Tensor advantages, Tensor token_ids, Tensor mask, float beta1, float beta2) -> ()")

}  // namespace gradops
