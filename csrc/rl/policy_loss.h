// policy_loss: the policy-gradient losses of a batch of sequences, with the derivative in every log-probability,
// in one pass over the tokens. Torch-free interface.
#pragma once
#include <cstdint>

#include "common/element.h"
#include "common/isa.h"

namespace gradops {

// The numbers of these enumerations are those of python/gradops/rl/_policy_kinds.py.
enum class PolicyObjective : int { clip, weight, masked_weight, gate, logp };
enum class PolicyLevel : int { token, sequence, geometric };
enum class PolicyKl : int { none, k1, k2, k3, k1_plus, k3_plus };
enum class PolicyAggregate : int { token_mean, sequence_mean, sequence_sum, sum };

// Sums over the unmasked tokens of one sequence, or of all.
enum PolicySum : int {
  kLoss,
  kRatioLess1,
  kLogRatio,
  kK3,
  kRefKl,
  kClipLow,
  kClipHigh,
  kClipDual,
  kTokens,
  kSequences,
  kPolicySums
};
enum PolicyTotal : int {
  kTotalLoss,
  kTotalScale,  // dlogp times this is the derivative of the loss
  kTotalClipLow,
  kTotalClipHigh,
  kTotalClipDual,
  kTotalRatio,
  kTotalK1,
  kTotalK3,
  kTotalRefKl,
  kTotalMasked,
  kTotalTokens,
  kTotalSequences,
  kPolicyTotals
};

struct PolicyRule {
  PolicyObjective objective;
  PolicyLevel level;
  PolicyKl kl;
  PolicyAggregate aggregate;
  double low, high, dual, cap, tau_pos, tau_neg, beta, normalizer;  // normalizer 0: what the aggregate says
};

struct PolicyLossTask {
  const void* logp;
  Element element;
  // float, or double for double logp; may be null: old_logp (then it is logp), ref_logp, weights (then 1)
  const void *old_logp, *advantages, *ref_logp, *weights;
  const uint8_t* mask;     // null: no token is masked
  const int64_t* offsets;  // sequences + 1; null: `length` tokens each
  void* dlogp;             // float, or double for double logp; without the last factor, which is totals[kTotalScale]
  double* totals;          // kPolicyTotals
  int64_t sequences, tokens, length;
  bool token_advantages, token_weights;  // else one per sequence
  PolicyRule rule;
};

// For sequences [begin, end): dlogp, and sums[s * kPolicySums ...]
GRADOPS_DECLARE(void, policy_loss_sequences, const PolicyLossTask&, int64_t begin, int64_t end, double* sums)

namespace cpu {
void policy_loss(const PolicyLossTask&, void* workspace, void* = nullptr);
int64_t policy_loss_workspace(const PolicyLossTask&);  // bytes
}  // namespace cpu
namespace cuda {
void policy_loss(const PolicyLossTask&, void* workspace, void* stream);
int64_t policy_loss_workspace(const PolicyLossTask&);
}  // namespace cuda
}  // namespace gradops
