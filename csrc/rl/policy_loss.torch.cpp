#include "rl/policy_loss.h"

#include <optional>

#include "common/torch_op.h"

namespace gradops {
namespace {

using MaybeTensor = std::optional<Tensor>;

MaybeTensor contiguous(const MaybeTensor& x) { return x ? MaybeTensor(contiguous_of(*x)) : std::nullopt; }
template <class T>
const T* pointer(const MaybeTensor& x) {
  return x ? static_cast<const T*>(x->const_data_ptr()) : nullptr;
}

// logp is (N,) with cu_seqlens (S + 1,), or (B, T). The other tensors are per token, or (advantages, is_weights) per
// sequence; they are float32, or float64 for float64 logp; mask is bool, cu_seqlens int64.
std::tuple<Tensor, Tensor> policy_loss(const Tensor& logp_in, const MaybeTensor& old_in, const Tensor& advantages_in,
                                       const MaybeTensor& offsets_in, const MaybeTensor& mask_in,
                                       const MaybeTensor& ref_in, const MaybeTensor& weights_in, int64_t objective,
                                       int64_t level, int64_t kl, int64_t aggregate,
                                       const std::vector<double>& numbers) {
  STD_TORCH_CHECK(logp_in.dim() == (offsets_in ? 1 : 2),
                  "policy_loss: logp must be (N,) with cu_seqlens, or (B, T) without, got ", logp_in.dim(),
                  " dimensions");
  STD_TORCH_CHECK(objective >= 0 && objective <= 4 && level >= 0 && level <= 2 && kl >= 0 && kl <= 5 &&
                      aggregate >= 0 && aggregate <= 3 && numbers.size() == 8,
                  "policy_loss: a rule that does not exist");
  STD_TORCH_CHECK(!offsets_in || (offsets_in->dim() == 1 && offsets_in->numel() > 0 &&
                                  offsets_in->scalar_type() == ScalarType::Long),
                  "policy_loss: cu_seqlens must be (S + 1,) of int64");
  const Scope scope(logp_in);
  const Tensor logp = contiguous_of(logp_in);
  const Element e = element(logp, "policy_loss: logp");
  const ScalarType computing = e == Element::f64 ? ScalarType::Double : ScalarType::Float;
  const int64_t tokens = logp.numel(), sequences = offsets_in ? offsets_in->numel() - 1 : logp.size(0);
  STD_TORCH_CHECK(sequences > 0 || tokens == 0, "policy_loss: cu_seqlens must end with the number of tokens");

  const auto per_token = [&](const Tensor& x) {
    if (x.dim() != logp.dim()) return false;
    for (int64_t i = 0; i < x.dim(); ++i)
      if (x.size(i) != logp.size(i)) return false;
    return true;
  };
  const auto check = [&](const MaybeTensor& x, const char* name, ScalarType type, bool or_sequence) {
    if (!x) return;
    STD_TORCH_CHECK(x->scalar_type() == type, "policy_loss: ", name, " has the wrong dtype");
    STD_TORCH_CHECK(per_token(*x) || (or_sequence && x->dim() == 1 && x->numel() == sequences), "policy_loss: ", name,
                    " must have the shape of logp", or_sequence ? ", or one number per sequence" : "");
    same_device(logp, *x, "policy_loss: all tensors");
  };
  check(old_in, "old_logp", computing, false);
  check(advantages_in, "advantages", computing, true);
  check(mask_in, "mask", ScalarType::Bool, false);
  check(ref_in, "ref_logp", computing, false);
  check(weights_in, "is_weights", computing, true);
  STD_TORCH_CHECK(kl == 0 || ref_in, "policy_loss: kl needs ref_logp");
  if (offsets_in) same_device(logp, *offsets_in, "policy_loss: all tensors");

  const MaybeTensor old_logp = contiguous(old_in), advantages = contiguous(advantages_in),
                    offsets = contiguous(offsets_in), mask = contiguous(mask_in),
                    ref_logp = contiguous(kl ? ref_in : std::nullopt), weights = contiguous(weights_in);
  Tensor dlogp = offsets ? empty(logp, {tokens}, computing) : empty(logp, {logp.size(0), logp.size(1)}, computing);
  Tensor totals = empty(logp, {kPolicyTotals}, ScalarType::Double);
  const PolicyLossTask task{
      logp.const_data_ptr(),
      e,
      pointer<void>(old_logp),
      pointer<void>(advantages),
      pointer<void>(ref_logp),
      pointer<void>(weights),
      pointer<uint8_t>(mask),
      pointer<int64_t>(offsets),
      dlogp.mutable_data_ptr(),
      static_cast<double*>(totals.mutable_data_ptr()),
      sequences,
      tokens,
      offsets ? 0 : logp.size(1),
      per_token(advantages_in),
      weights_in && per_token(*weights_in),
      PolicyRule{PolicyObjective(objective), PolicyLevel(level), PolicyKl(kl), PolicyAggregate(aggregate), numbers[0],
                 numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7]}};
  const Workspace memory(logp, backend::policy_loss_workspace(task));
  backend::policy_loss(task, memory.data(), scope.stream());
  return {totals, dlogp};
}

}  // namespace

// numbers: PolicyRule's, from low to normalizer
GRADOPS_OP(policy_loss,
           "policy_loss(Tensor logp, Tensor? old_logp, Tensor advantages, Tensor? cu_seqlens, Tensor? mask, "
           "Tensor? ref_logp, Tensor? is_weights, int objective, int level, int kl, int aggregate, float[] numbers) "
           "-> (Tensor totals, Tensor dlogp)")

}  // namespace gradops
