// Tile by tile: gather the numbers (masked ones as harmless zeros), then losses and slopes, then sums in double.
#include "rl/policy_loss.h"

#include "common/exp_log.h"
#include "common/widen.h"
#include "rl/token_tile.h"

#define GRADOPS_INLINE [[gnu::always_inline]] inline
#include "rl/policy_token.h"

namespace gradops::GRADOPS_ISA {
namespace {

template <class C>
struct Tile {
  alignas(64) C widened[kTile];  // log-probabilities, where they are 16-bit numbers
  alignas(64) C log_ratio[kTile], logp[kTile], advantage[kTile], weight[kTile], u[kTile];  // u: ref_logp - logp
  // The ratio of a whole sequence, once per token: the compiler would split a loop with an invariant in comparisons,
  // and then not vectorize it.
  alignas(64) C ratio[kTile];
  alignas(64) C loss[kTile], slope[kTile], k3[kTile], ref[kTile], code[kTile];
};

// The tokens of one sequence.
template <class C>
struct Sequence {
  const void* logp;
  const C *old_logp, *advantage, *ref_logp, *weight;  // null: absent, or in `one_...`
  const uint8_t* mask;
  C* dlogp;
  int64_t length;
  C one_advantage, one_weight;

  Sequence(const PolicyLossTask& t, int64_t s) {
    const int64_t begin = t.offsets ? t.offsets[s] : s * t.length;
    const auto at = [=](const void* p) { return p ? static_cast<const C*>(p) + begin : nullptr; };
    length = t.offsets ? t.offsets[s + 1] - begin : t.length;
    logp = static_cast<const char*>(t.logp) + begin * element_size(t.element);
    old_logp = at(t.old_logp);
    ref_logp = at(t.ref_logp);
    advantage = t.token_advantages ? at(t.advantages) : nullptr;
    weight = t.token_weights ? at(t.weights) : nullptr;
    one_advantage = t.token_advantages ? C(0) : static_cast<const C*>(t.advantages)[s];
    one_weight = t.weights && !t.token_weights ? static_cast<const C*>(t.weights)[s] : C(1);
    mask = t.mask ? t.mask + begin : nullptr;
    dlogp = static_cast<C*>(t.dlogp) + begin;
  }
};

// The loops over a tile are functions of their own: compiled once for each of their kinds, not of `sequence`'s.
template <class C>
[[gnu::noinline]] const C* log_probabilities(Element type, const void* logp, int64_t at, int n, Tile<C>& tile) {
  const C* found = nullptr;
  with_type(type, [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(logp) + at;
    if constexpr (sizeof *from == 2)
      for (int i = 0; i < n; ++i) tile.widened[i] = C(widen(from[i]));
    else if constexpr (sizeof *from == sizeof(C))
      found = from;
  });
  return found ? found : tile.widened;
}

template <class C>
[[gnu::noinline]] void gather_log_ratio(const Sequence<C>& q, const C* logp, int64_t at, int n, Tile<C>& tile) {
  const C* old_logp = q.old_logp + (q.old_logp ? at : 0);
  const uint8_t* mask = q.mask ? q.mask + at : nullptr;
  if (old_logp)
    gather(tile.log_ratio, mask, n, [=](int i) { return logp[i] - old_logp[i]; });
  else
    gather(tile.log_ratio, mask, n, [=](int) { return C(0); });
}

template <PolicyObjective kObjective, class C>
[[gnu::noinline]] void gather_rest(const Sequence<C>& q, const C* logp, int64_t at, int n, Tile<C>& tile) {
  const C *advantage = q.advantage + (q.advantage ? at : 0), *weight = q.weight + (q.weight ? at : 0),
          *ref_logp = q.ref_logp + (q.ref_logp ? at : 0);
  const uint8_t* mask = q.mask ? q.mask + at : nullptr;
  constexpr bool apart = kObjective == PolicyObjective::masked_weight;  // there the weight is capped with the ratio
  const C one_advantage = apart ? q.one_advantage : q.one_advantage * q.one_weight, one_weight = q.one_weight;
  if (!apart && weight && advantage)
    gather(tile.advantage, mask, n, [=](int i) { return advantage[i] * weight[i]; });
  else if (!apart && weight)
    gather(tile.advantage, mask, n, [=](int i) { return one_advantage * weight[i]; });
  else if (advantage)
    gather(tile.advantage, mask, n, [=](int i) { return apart ? advantage[i] : advantage[i] * one_weight; });
  else
    gather(tile.advantage, mask, n, [=](int) { return one_advantage; });
  if (apart && weight) gather(tile.weight, mask, n, [=](int i) { return weight[i]; });
  if (apart && !weight) gather(tile.weight, mask, n, [=](int) { return one_weight; });
  if (!has_ratio_slope<kObjective>) gather(tile.logp, mask, n, [=](int i) { return logp[i]; });
  if (ref_logp) gather(tile.u, mask, n, [=](int i) { return ref_logp[i] - logp[i]; });
}

// Losses, slopes and statistics of a tile; the ratio is that of each token, or the sequence's.
template <PolicyObjective kObjective, bool kShared, class C>
[[gnu::noinline]] void evaluate(Tile<C>& tile, int n, TokenRule<C> rule) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C d = tile.log_ratio[i];
    const Exp<C> own = exp_parts(d, exp_of(d), exp_tail(d));
    const TokenLoss<C> l = token_loss<kObjective>(rule, kShared ? tile.ratio[i] : own.e, tile.advantage[i],
                                                  tile.weight[i], tile.logp[i], [](C x) { return exp_of(x); });
    tile.loss[i] = l.loss;
    tile.slope[i] = l.slope;
    tile.code[i] = l.code;
    tile.k3[i] = own.k3;
  }
}

// Adds the KL term to losses and slopes; without `before`, the slopes were zero.
template <PolicyKl kKl, class C>
[[gnu::noinline]] void add_kl(Tile<C>& tile, int n, C beta, bool before) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C u = tile.u[i];
    const TokenKl<C> k = token_kl<kKl>(u, exp_parts(u, exp_of(u), exp_tail(u)));
    tile.ref[i] = k.value;
    tile.loss[i] += beta * k.value;
    const C slope = tile.slope[i];
    tile.slope[i] = (before ? slope : C(0)) + beta * k.slope;
  }
}

template <class C>
[[gnu::noinline]] void store(C* to, const C* from, const uint8_t* mask, int n, C factor) {
  if (mask) {
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      const C x = from[i] * factor;
      to[i] = mask[i] ? x : C(0);
    }
  } else {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] = from[i] * factor;
  }
}

template <PolicyObjective kObjective, bool kShared, class C>
void sequence(const PolicyLossTask& t, int64_t s, double* sums) {
  const Sequence<C> q(t, s);
  for (int k = 0; k < kPolicySums; ++k) sums[k] = 0;
  const int64_t count = count_tokens(q.mask, q.length);
  if (count == 0) {
    for (int64_t i = 0; i < q.length; ++i) q.dlogp[i] = C(0);
    return;
  }
  sums[kTokens] = double(count);
  sums[kSequences] = 1;
  Tile<C> tile;
  if (kShared) {
    double log_ratio = 0;
    each_tile(q.length, [&](int64_t at, int n, int full) {
      gather_log_ratio(q, log_probabilities(t.element, q.logp, at, n, tile), at, n, tile);
      log_ratio += tile_sum(tile.log_ratio, full);
    });
    if (t.rule.level == PolicyLevel::geometric) log_ratio /= double(count);
    const Exp<double> exact = exp_parts(log_ratio, exp_of(log_ratio), exp_tail(log_ratio));
    const bool fits = !(exact.e > double(Largest<C>::value));
    for (int i = 0; i < kTile; ++i) tile.ratio[i] = fits ? C(exact.e) : Largest<C>::value;
    sums[kRatioLess1] = (fits ? exact.less1 : double(Largest<C>::value)) * double(count);
  }
  constexpr bool common_slope = kShared && has_ratio_slope<kObjective>;  // each logp moves every token's ratio
  const TokenRule<C> rule(t.rule);
  const double share = t.rule.aggregate == PolicyAggregate::sequence_mean ? 1 / double(count) : 1.;
  double slope = 0;
  each_tile(q.length, [&](int64_t at, int n, int full) {
    if (q.mask && count_tokens(q.mask + at, n) == 0) {  // much of a padded batch
      for (int i = 0; i < n; ++i) q.dlogp[at + i] = C(0);
      return;
    }
    const C* logp = log_probabilities(t.element, q.logp, at, n, tile);
    gather_log_ratio(q, logp, at, n, tile);
    gather_rest<kObjective>(q, logp, at, n, tile);
    evaluate<kObjective, kShared>(tile, full, rule);
    if (common_slope) slope += tile_sum(tile.slope, full);
    if (q.ref_logp) {
      with_kl(t.rule.kl, [&](auto kl) { add_kl<decltype(kl)::value>(tile, full, C(t.rule.beta), !common_slope); });
      sums[kRefKl] += tile_sum(tile.ref, full);
    }
    if (!common_slope || q.ref_logp) store(q.dlogp + at, tile.slope, q.mask ? q.mask + at : nullptr, n, C(share));
    sums[kLoss] += tile_sum(tile.loss, full);
    sums[kLogRatio] += tile_sum(tile.log_ratio, full);
    sums[kK3] += tile_sum(tile.k3, full);
    const int64_t codes = int64_t(tile_sum(tile.code, full));
    sums[kClipLow] += double(codes & 0xffff);
    sums[kClipHigh] += double(codes >> 16 & 0xffff);
    sums[kClipDual] += double(codes >> 32);
  });
  sums[kLoss] *= share;
  if (!kShared) sums[kRatioLess1] = sums[kK3] + sums[kLogRatio];
  if (common_slope) {
    const C each = C(slope * share / (t.rule.level == PolicyLevel::geometric ? double(count) : 1.));
#pragma omp simd
    for (int64_t i = 0; i < q.length; ++i) {
      const C before = q.ref_logp ? q.dlogp[i] : C(0);
      q.dlogp[i] = q.mask && !q.mask[i] ? C(0) : before + each;
    }
  }
}

template <PolicyObjective kObjective>
void sequences(const PolicyLossTask& t, int64_t begin, int64_t end, double* sums) {
  const bool token = t.rule.level == PolicyLevel::token;
  const auto run = t.element == Element::f64
                       ? token ? sequence<kObjective, false, double> : sequence<kObjective, true, double>
                   : token ? sequence<kObjective, false, float>
                           : sequence<kObjective, true, float>;
  for (int64_t s = begin; s < end; ++s) run(t, s, sums + s * kPolicySums);
}

}  // namespace

void policy_loss_sequences(const PolicyLossTask& t, int64_t begin, int64_t end, double* sums) {
  switch (t.rule.objective) {
    case PolicyObjective::clip:
      return sequences<PolicyObjective::clip>(t, begin, end, sums);
    case PolicyObjective::weight:
      return sequences<PolicyObjective::weight>(t, begin, end, sums);
    case PolicyObjective::masked_weight:
      return sequences<PolicyObjective::masked_weight>(t, begin, end, sums);
    case PolicyObjective::gate:
      return sequences<PolicyObjective::gate>(t, begin, end, sums);
    case PolicyObjective::logp:
      return sequences<PolicyObjective::logp>(t, begin, end, sums);
  }
}

}  // namespace gradops::GRADOPS_ISA
