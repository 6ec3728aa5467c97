#include "rl/rollout_correction.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

std::tuple<Tensor, Tensor> rollout_correction(const Tensor& old_in, const Tensor& rollout_in,
                                              const std::optional<Tensor>& offsets_in,
                                              const std::optional<Tensor>& mask_in, int64_t level, bool reject,
                                              double low, double high, double log_veto) {
  const ScalarType type = old_in.scalar_type();
  STD_TORCH_CHECK(old_in.dim() == (offsets_in ? 1 : 2),
                  "rollout_correction: old_logp must be (N,) with cu_seqlens, or (B, T) without, got ", old_in.dim(),
                  " dimensions");
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double,
                  "rollout_correction: old_logp must be float32 or float64");
  const auto check = [&](const Tensor& x, const char* name, ScalarType wanted) {
    bool same = x.dim() == old_in.dim();
    for (int64_t i = 0; same && i < x.dim(); ++i) same = x.size(i) == old_in.size(i);
    STD_TORCH_CHECK(same && x.scalar_type() == wanted, "rollout_correction: ", name, " has the wrong shape or dtype");
    same_device(old_in, x, "rollout_correction: all tensors");
  };
  check(rollout_in, "rollout_logp", type);
  if (mask_in) check(*mask_in, "mask", ScalarType::Bool);
  STD_TORCH_CHECK(level >= 0 && level <= 2, "rollout_correction: no such level");
  STD_TORCH_CHECK(!offsets_in || (offsets_in->dim() == 1 && offsets_in->numel() > 0 &&
                                  offsets_in->scalar_type() == ScalarType::Long),
                  "rollout_correction: cu_seqlens must be (S + 1,) of int64");
  if (offsets_in) same_device(old_in, *offsets_in, "rollout_correction: all tensors");
  const int64_t tokens = old_in.numel(), sequences = offsets_in ? offsets_in->numel() - 1 : old_in.size(0);
  STD_TORCH_CHECK(sequences > 0 || tokens == 0, "rollout_correction: cu_seqlens must end with the number of tokens");

  const Scope scope(old_in);
  const Tensor old_logp = contiguous_of(old_in), rollout = contiguous_of(rollout_in);
  const std::optional<Tensor> offsets = offsets_in ? std::optional(contiguous_of(*offsets_in)) : std::nullopt,
                              mask = mask_in ? std::optional(contiguous_of(*mask_in)) : std::nullopt;
  Tensor weights = new_like(old_logp);
  const std::vector<int64_t> shape =
      offsets ? std::vector<int64_t>{tokens} : std::vector<int64_t>{old_logp.size(0), old_logp.size(1)};
  Tensor keep = empty(old_logp, shape, ScalarType::Bool);
  const RolloutTask task{old_logp.const_data_ptr(),
                         rollout.const_data_ptr(),
                         mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                         offsets ? static_cast<const int64_t*>(offsets->const_data_ptr()) : nullptr,
                         weights.mutable_data_ptr(),
                         static_cast<uint8_t*>(keep.mutable_data_ptr()),
                         type == ScalarType::Double,
                         sequences,
                         tokens,
                         offsets ? 0 : old_logp.size(1),
                         int(level),
                         reject,
                         low,
                         high,
                         log_veto};
  backend::rollout_correction(task, scope.stream());
  return {weights, keep};
}

}  // namespace

GRADOPS_OP(rollout_correction,
           "rollout_correction(Tensor old_logp, Tensor rollout_logp, Tensor? cu_seqlens, Tensor? mask, int level, "
           "bool reject, float low, float high, float log_veto) -> (Tensor weights, Tensor keep)")

}  // namespace gradops
