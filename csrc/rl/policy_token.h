// policy_token.h: the loss of one token and its derivative, for the CPU and the CUDA kernels alike.
// Without branches, so that loops over it become vector code. Include it after defining GRADOPS_INLINE.
//
// A NaN passes every comparison here unharmed: `x > y ? y : x` keeps a NaN x.
#pragma once
#include "rl/policy_loss.h"

namespace gradops {
namespace {

template <class C>
struct Largest;
template <>
struct Largest<float> {
  static constexpr float value = 3.402823466e38f;
};
template <>
struct Largest<double> {
  static constexpr double value = 1.7976931348623157e308;
};

// exp(x), which saturates at the largest number; exp(x) - 1 and exp(x) - 1 - x, to full precision near 0.
// tail is (exp(x) - 1 - x) / x^2, right for |x| < 0.34.
template <class C>
struct Exp {
  C e, less1, k3;
};
template <class C>
GRADOPS_INLINE Exp<C> exp_parts(C x, C exp_of_x, C tail) {
  const C e = exp_of_x > Largest<C>::value ? Largest<C>::value : exp_of_x, k3 = x * x * tail;
  const bool small = (x < C(0.34)) & (x > C(-0.34));
  return {e, small ? x + k3 : e - C(1), small ? k3 : e - C(1) - x};
}

template <class C>
struct TokenRule {
  C low, high, dual, cap, tau_pos, tau_neg;
  GRADOPS_INLINE explicit TokenRule(const PolicyRule& r)
      : low(C(r.low)), high(C(r.high)), dual(C(r.dual)), cap(C(r.cap)), tau_pos(C(r.tau_pos)), tau_neg(C(r.tau_neg)) {}
};

template <class C>
struct TokenLoss {
  C loss, slope, code;  // slope: the derivative in logp, or in the logarithm of the ratio where has_ratio_slope
};
// One number tells which clip held a token; the sum over fewer than 2^16 tokens tells how many each held.
constexpr float kCodeLow = 1, kCodeHigh = 65536, kCodeDual = 4294967296.f;

template <PolicyObjective o>
constexpr bool has_ratio_slope = o == PolicyObjective::clip || o == PolicyObjective::gate;

// r: the ratio. a: the advantage, times the weight except for masked_weight. exp_of: for the gate.
template <PolicyObjective kObjective, class C, class F>
GRADOPS_INLINE TokenLoss<C> token_loss(const TokenRule<C>& t, C r, C a, C w, C logp, const F& exp_of) {
  const bool negative = a<C(0), positive = a> C(0), below = r<t.low, above = r> t.high;
  const C lp = logp < -Largest<C>::value ? -Largest<C>::value : logp;
  if constexpr (kObjective == PolicyObjective::clip) {
    const bool over = r > t.dual;
    const bool low = negative & below, high = positive & above, dual = negative & over;
    const C used = high ? t.high : dual ? t.dual : low ? t.low : r;
    const C slope = low | high | dual ? C(0) : -a * r;
    return {-a * used, slope, dual ? C(kCodeDual) : high ? C(kCodeHigh) : low ? C(kCodeLow) : C(0)};
  } else if constexpr (kObjective == PolicyObjective::weight) {
    const C raised = below ? t.low : r, coefficient = a * (above ? t.high : raised);
    const bool counts = negative | positive;
    return {-coefficient * lp, -coefficient, above & counts ? C(kCodeHigh) : below & counts ? C(kCodeLow) : C(0)};
  } else if constexpr (kObjective == PolicyObjective::masked_weight) {
    const bool low = negative & below, high = positive & above;
    const C rw = r * w, capped = a * (rw > t.cap ? t.cap : rw), coefficient = low | high ? C(0) : capped;
    return {-coefficient * lp, -coefficient, high ? C(kCodeHigh) : low ? C(kCodeLow) : C(0)};
  } else if constexpr (kObjective == PolicyObjective::gate) {
    const C tau = positive ? t.tau_pos : t.tau_neg, q = exp_of(tau - tau * r), gate = C(1) / (C(1) + q);
    return {-a * (C(4) / tau) * gate, -a * C(4) * gate * gate * (q == C(0) ? C(0) : q * r), C(0)};
  } else {
    return {-a * lp, -a, C(0)};
  }
}

// The estimate of KL(policy, reference) and its derivative in logp, from u = ref_logp - logp.
template <PolicyKl kl>
struct KlOf {
  static constexpr PolicyKl value = kl;
};
template <class C>
struct TokenKl {
  C value, slope;
};
template <PolicyKl kKl, class C>
GRADOPS_INLINE TokenKl<C> token_kl(C u, Exp<C> of_u) {
  const C k2 = C(0.5) * u * u;
  if constexpr (kKl == PolicyKl::k1) return {-u, C(1)};
  if constexpr (kKl == PolicyKl::k1_plus) return {-u, -u};
  if constexpr (kKl == PolicyKl::k2) return {k2, -u};
  return {of_u.k3, kKl == PolicyKl::k3 ? -of_u.less1 : -u};
}
template <class F>
GRADOPS_INLINE void with_kl(PolicyKl kl, const F& f) {  // calls f with a type whose `value` is kl; not for none
  switch (kl) {
    case PolicyKl::k1:
      return f(KlOf<PolicyKl::k1>());
    case PolicyKl::k1_plus:
      return f(KlOf<PolicyKl::k1_plus>());
    case PolicyKl::k2:
      return f(KlOf<PolicyKl::k2>());
    case PolicyKl::k3:
      return f(KlOf<PolicyKl::k3>());
    case PolicyKl::k3_plus:
      return f(KlOf<PolicyKl::k3_plus>());
    case PolicyKl::none:
      return;
  }
}

// From the sums over everything to the totals.
GRADOPS_INLINE void finish_policy_loss(const PolicyRule& rule, double all_tokens, const double* sum, double* total) {
  const double tokens = sum[kTokens], sequences = sum[kSequences];
  const double count = rule.aggregate == PolicyAggregate::token_mean ? tokens
                       : rule.aggregate == PolicyAggregate::sum      ? 1.
                                                                     : sequences;
  const double divisor = rule.normalizer > 0 ? rule.normalizer : count;
  total[kTotalScale] = divisor > 0 ? 1 / divisor : 0;
  total[kTotalLoss] = divisor > 0 ? sum[kLoss] / divisor : 0;
  const double each = tokens > 0 ? 1 / tokens : 0;
  total[kTotalClipLow] = sum[kClipLow] * each;
  total[kTotalClipHigh] = sum[kClipHigh] * each;
  total[kTotalClipDual] = sum[kClipDual] * each;
  total[kTotalRatio] = tokens > 0 ? 1 + sum[kRatioLess1] * each : 0;
  total[kTotalK1] = -sum[kLogRatio] * each;
  total[kTotalK3] = sum[kK3] * each;
  total[kTotalRefKl] = sum[kRefKl] * each;
  total[kTotalMasked] = all_tokens > 0 ? (all_tokens - tokens) / all_tokens : 0;
  total[kTotalTokens] = tokens;
  total[kTotalSequences] = sequences;
}

}  // namespace
}  // namespace gradops
