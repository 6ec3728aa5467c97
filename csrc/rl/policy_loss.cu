// One block per sequence: thread i takes tokens i, i + kThreads, ... Sums are made in double and in a fixed order,
// over the threads of a block and then over the sequences.
#include "common/device_number.cuh"
#include "common/reduce.cuh"
#include "rl/policy_loss.h"
#include "rl/token_range.cuh"

#define GRADOPS_INLINE __device__ inline
#include "rl/policy_token.h"

namespace gradops {
namespace {

constexpr int kThreads = 256;

// Adds up each of a thread's kPolicySums numbers over the block, one warp per number: fn(k, sum) is called once for
// each, by a single thread. parts: kPolicySums * kThreads.
template <class F>
__device__ inline void block_sums(const double* mine, double* parts, F fn) {
#pragma unroll
  for (int k = 0; k < kPolicySums; ++k) parts[k * kThreads + threadIdx.x] = mine[k];
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int k = threadIdx.x / 32; k < kPolicySums; k += kThreads / 32) {
    double sum = 0;
    for (int i = lane; i < kThreads; i += 32) sum += parts[k * kThreads + i];
    sum = warp_all(sum, Add());
    if (lane == 0) fn(k, sum);
  }
}

// (exp(x) - 1 - x) / x^2 for |x| < 0.35: the Taylor series, long enough for the type
__device__ inline float exp_tail(float x) {
  return 0.5f + x * (1.f / 6 + x * (1.f / 24 + x * (1.f / 120 + x * (1.f / 720 + x * (1.f / 5040)))));
}
__device__ inline double exp_tail(double x) {
  double p = 0, factorial = 6227020800.;  // 13!
  for (int k = 13; k >= 2; --k) {
    p = 1 / factorial + x * p;
    factorial /= k;
  }
  return p;
}
template <class C>
__device__ inline Exp<C> exp_of_ratio(C x) {
  return exp_parts(x, exp_of(x), exp_tail(x));
}

template <PolicyObjective kObjective, class T>
__global__ void __launch_bounds__(kThreads)
    policy_loss_blocks(const __grid_constant__ PolicyLossTask t, double* __restrict__ sums) {
  using C = Arithmetic<T>;
  __shared__ double scratch[32], parts[kPolicySums * kThreads];
  const auto all = [&](double v) { return block_all(v, 0., scratch, Add()); };
  const int64_t s = blockIdx.x;
  const auto [begin, end] = token_range(t, s);
  const int64_t first = begin + threadIdx.x;
  const auto kept = [=](int64_t i) { return !t.mask || t.mask[i]; };
  const auto logp = [=](int64_t i) { return C(to_double(static_cast<const T*>(t.logp)[i])); };
  const auto at = [](const void* p, int64_t i) { return static_cast<const C*>(p)[i]; };
  const auto log_ratio = [=](int64_t i) { return t.old_logp ? logp(i) - at(t.old_logp, i) : C(0); };
  C* dlogp = static_cast<C*>(t.dlogp);

  const bool shared = t.rule.level != PolicyLevel::token, mean = t.rule.aggregate == PolicyAggregate::sequence_mean;
  double count = 0, log_shared = 0;
  if (t.mask && (shared || mean)) {
    for (int64_t i = first; i < end; i += kThreads) count += kept(i);
    count = all(count);
  } else {
    count = end > begin ? double(end - begin) : 0;  // all, or not needed
  }
  if (shared) {
    for (int64_t i = first; i < end; i += kThreads) log_shared += kept(i) ? double(log_ratio(i)) : 0.;
    log_shared = all(log_shared);
    if (t.rule.level == PolicyLevel::geometric) log_shared /= count > 0 ? count : 1;
  }
  const Exp<double> exact = exp_of_ratio(log_shared);
  const bool fits = !(exact.e > double(Largest<C>::value));
  const C common = fits ? C(exact.e) : Largest<C>::value;

  const TokenRule<C> rule(t.rule);
  const bool common_slope = shared && has_ratio_slope<kObjective>;  // each logp moves every token's ratio
  const C share = C(mean ? 1 / (count > 0 ? count : 1) : 1.), beta = C(t.rule.beta);
  double sum[kPolicySums] = {}, slope = 0;
  for (int64_t i = first; i < end; i += kThreads) {
    if (!kept(i)) {
      dlogp[i] = C(0);
      continue;
    }
    const C lp = logp(i), d = log_ratio(i), advantage = at(t.advantages, t.token_advantages ? i : s);
    const C weight = t.weights ? at(t.weights, t.token_weights ? i : s) : C(1);
    const Exp<C> own = exp_of_ratio(d);
    TokenLoss<C> l = token_loss<kObjective>(
        rule, shared ? common : own.e, kObjective == PolicyObjective::masked_weight ? advantage : advantage * weight,
        weight, lp, [](C x) { return exp_of(x); });
    if (common_slope) slope += double(l.slope), l.slope = C(0);
    if (t.ref_logp) {
      const C u = at(t.ref_logp, i) - lp;
      TokenKl<C> k{};
      with_kl(t.rule.kl, [&](auto which) { k = token_kl<decltype(which)::value>(u, exp_of_ratio(u)); });
      sum[kRefKl] += double(k.value);
      l.loss += beta * k.value;
      l.slope += beta * k.slope;
    }
    dlogp[i] = l.slope * share;
    sum[kLoss] += double(l.loss);
    sum[kRatioLess1] += shared ? (fits ? exact.less1 : double(Largest<C>::value)) : double(own.less1);
    sum[kLogRatio] += double(d);
    sum[kK3] += double(own.k3);
    sum[kClipLow] += l.code == C(kCodeLow);
    sum[kClipHigh] += l.code == C(kCodeHigh);
    sum[kClipDual] += l.code == C(kCodeDual);
    sum[kTokens] += 1;
  }
  if (common_slope) {
    slope = all(slope) * (mean ? 1 / (count > 0 ? count : 1) : 1.);
    const C each = C(t.rule.level == PolicyLevel::geometric ? slope / (count > 0 ? count : 1) : slope);
    for (int64_t i = first; i < end; i += kThreads)
      if (kept(i)) dlogp[i] += each;
  }
  const double loss_share = mean ? 1 / (count > 0 ? count : 1) : 1.;
  block_sums(sum, parts, [=](int k, double v) {
    if (k == kSequences) return;
    sums[s * kPolicySums + k] = k == kLoss ? v * loss_share : v;
    if (k == kTokens) sums[s * kPolicySums + kSequences] = v > 0;
  });
}

__global__ void __launch_bounds__(kThreads)
    policy_loss_total(const __grid_constant__ PolicyLossTask t, const double* __restrict__ sums) {
  __shared__ double parts[kPolicySums * kThreads], result[kPolicySums];
  double sum[kPolicySums] = {};
  for (int64_t s = threadIdx.x; s < t.sequences; s += kThreads) {
#pragma unroll
    for (int k = 0; k < kPolicySums; ++k) sum[k] += sums[s * kPolicySums + k];
  }
  block_sums(sum, parts, [&](int k, double v) { result[k] = v; });
  __syncthreads();
  if (threadIdx.x == 0) finish_policy_loss(t.rule, double(t.tokens), result, t.totals);
}

template <PolicyObjective kObjective>
void run(const PolicyLossTask& t, double* sums, void* stream) {
  with_device_type(t.element, [&](auto type) {
    launch(policy_loss_blocks<kObjective, decltype(type)>, blocks(t.sequences), kThreads, 0, stream, t, sums);
  });
}

}  // namespace

int64_t cuda::policy_loss_workspace(const PolicyLossTask& t) { return 8 * kPolicySums * t.sequences; }

void cuda::policy_loss(const PolicyLossTask& t, void* workspace, void* stream) {
  double* sums = static_cast<double*>(workspace);
  if (t.sequences > 0) {
    switch (t.rule.objective) {
      case PolicyObjective::clip:
        run<PolicyObjective::clip>(t, sums, stream);
        break;
      case PolicyObjective::weight:
        run<PolicyObjective::weight>(t, sums, stream);
        break;
      case PolicyObjective::masked_weight:
        run<PolicyObjective::masked_weight>(t, sums, stream);
        break;
      case PolicyObjective::gate:
        run<PolicyObjective::gate>(t, sums, stream);
        break;
      case PolicyObjective::logp:
        run<PolicyObjective::logp>(t, sums, stream);
        break;
    }
  }
  launch(policy_loss_total, 1, kThreads, 0, stream, t, sums);
}

}  // namespace gradops
