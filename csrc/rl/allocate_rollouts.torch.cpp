#include "rl/allocate_rollouts.h"

#include "common/torch_op.h"
#include "common/value_error.h"

#if GRADOPS_BACKEND_ID == 1  // a plan is made on the host
namespace gradops {
namespace {

Tensor allocate_rollouts(const Tensor& p_in, int64_t budget, int64_t low, int64_t high, bool exact) {
  STD_TORCH_CHECK(p_in.dim() == 1 && p_in.scalar_type() == ScalarType::Double,
                  "allocate_rollouts: p must be float64 (prompts)");
  const Tensor p = contiguous_of(p_in);
  const int64_t prompts = p.numel();
  STD_TORCH_CHECK(low >= 1 && low <= high && high <= 65536, "allocate_rollouts: 1 <= low <= high <= 65536 must hold");
  STD_TORCH_CHECK(budget >= prompts * low, "allocate_rollouts: budget must be at least low * prompts = ", prompts * low,
                  ", got ", budget);
  const double* data = static_cast<const double*>(p.const_data_ptr());
  for (int64_t i = 0; i < prompts; ++i)
    if (!(data[i] >= 0 && data[i] <= 1))
      refuse_value("p", "be in [0, 1]", std::to_string(data[i]) + " at index " + std::to_string(i));
  Tensor counts = empty(p, {prompts}, ScalarType::Long);
  cpu::allocate_rollouts({data, static_cast<int64_t*>(counts.mutable_data_ptr()), prompts, budget, low, high, exact});
  return counts;
}

}  // namespace

GRADOPS_OP(allocate_rollouts, "allocate_rollouts(Tensor p, int budget, int low, int high, bool exact) -> Tensor")

}  // namespace gradops
#endif
